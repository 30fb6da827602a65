// Random programs of allocations, frees, work, events, waits, pools, captures, limits and faults
// on the simulated device, from one thread and from several. After each program nothing may be
// misused, inconsistent or leaked, and no two live allocations overlap at any time.
//
//   VT_FUZZ_SEED=n      the first seed (default: fixed)
//   VT_FUZZ_OPS=n       operations in all (default 1,000,000)
#include "test_cuda_allocator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cuda/allocator/pinned_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

constexpr const char* kSettings[] = {
    "expandable_segments:true",
    "expandable_segments:false",
    "expandable_segments:false,max_split_size_mb:32",
    "expandable_segments:true,garbage_collection_threshold:0.6",
    "expandable_segments:false,garbage_collection_threshold:0.5",
    "expandable_segments:true,roundup_power2_divisions:4",
    "expandable_segments:true,memory_limit_mb:160",
    "backend:async",
};

/// Addresses that are handed out, over all threads.
class LiveRanges {
 public:
  bool add(uintptr_t address, size_t nbytes) {
    const std::lock_guard lock(mutex_);
    const auto next = live_.lower_bound(address);
    const bool apart =
        (next == live_.end() || address + nbytes <= next->first) &&
        (next == live_.begin() || std::prev(next)->first + std::prev(next)->second <= address);
    live_[address] = nbytes;
    return apart;
  }
  void remove(uintptr_t address) {
    const std::lock_guard lock(mutex_);
    live_.erase(address);
  }

 private:
  std::mutex mutex_;
  std::map<uintptr_t, size_t> live_;
};

struct Shared {
  SimulatedDevice& device;
  CachingAllocator& allocator;
  LiveRanges ranges;
  std::atomic<bool> exact{true};  // errors other than out of memory are failures
  std::atomic<int64_t> refused{0};
};

/// One thread's part of a program. Its streams are its own, so that its waits order its work.
class Player {
 public:
  Player(Shared& shared, std::vector<StreamHandle> streams, uint64_t seed, bool alone)
      : shared_(shared), streams_(std::move(streams)), random_(seed), alone_(alone) {}

  void play(int64_t operations) {
    for (int64_t i = 0; i < operations; ++i) step();
  }

  void finish() {
    end_capture();
    while (!routed_.empty()) end_route();
    while (!live_.empty()) release(live_.size() - 1);
    while (!held_.empty()) {
      shared_.allocator.release_pool(held_.back());
      held_.pop_back();
    }
  }

  size_t live() const { return live_.size(); }

 private:
  struct Live {
    Allocation allocation;
    StreamHandle stream;
    bool reads_only = false;  // another stream reads it, and nothing waits for that
  };

  uint64_t below(uint64_t n) { return random_() % n; }
  StreamHandle any_stream() {
    return capturing_ && below(4) != 0 ? captured_ : streams_[below(streams_.size())];
  }

  size_t any_size() {
    switch (below(16)) {
      case 0:
        return 1 + below(512);
      case 1:
      case 2:
        return (1 + below(64)) * 512;
      case 3:
      case 4:
        return 1 + below(MiB);
      case 5:
        return MiB + below(3 * MiB);
      case 6:
        return 1 + below(48 * MiB);
      default:
        return (size_t{512} << below(14)) - below(100);
    }
  }

  template <class F>
  bool attempt(F&& f) {
    try {
      f();
      return true;
    } catch (const Error& e) {
      ++shared_.refused;
      if (shared_.exact.load() && e.kind() != ErrorKind::OutOfMemory) {
        CHECK_EMPTY("unexpected error: " + e.message());
      }
      return false;
    }
  }

  void allocate() {
    const StreamHandle stream = any_stream();
    const size_t nbytes = any_size();
    attempt([&] {
      const Allocation a = shared_.allocator.allocate(nbytes, stream);
      CHECK(a.nbytes == nbytes && address_of(a) % 512 == 0);
      CHECK(shared_.ranges.add(address_of(a), nbytes));
      // The owner writes first: ordered after every earlier owner's work, or the device tells.
      shared_.device.launch(stream, {{address_of(a), nbytes, true}});
      live_.push_back({a, stream, false});
    });
  }

  void release(size_t index) {
    const Live gone = live_[index];
    live_[index] = live_.back();
    live_.pop_back();
    shared_.ranges.remove(address_of(gone.allocation));
    give_back(gone.allocation);
  }

  void use() {
    const Live& one = live_[below(live_.size())];
    shared_.device.launch(one.stream,
                          {{address_of(one.allocation), one.allocation.nbytes, !one.reads_only}});
  }

  /// Another stream works with the allocation, and the owner's stream may go on before it.
  void use_elsewhere() {
    Live& one = live_[below(live_.size())];
    const StreamHandle other = any_stream();
    const bool in_capture = capturing_ && (one.stream == captured_ || other == captured_);
    if (other == one.stream || (in_capture && !(one.stream == captured_ && other == side_))) return;
    if (capturing_ && (one.stream == side_ || other == side_) && one.stream != captured_) return;
    shared_.device.wait_stream(other, one.stream);
    const size_t nbytes = one.allocation.nbytes;
    const bool write = !one.reads_only && below(2) == 0;
    shared_.device.launch(other, {{address_of(one.allocation), nbytes, write}});
    if (!attempt([&] { shared_.allocator.record_stream(one.allocation.context, other); })) return;
    if (write || below(2) == 0) {
      shared_.device.wait_stream(one.stream, other);
    } else {
      one.reads_only = true;
    }
  }

  void synchronize() {
    const StreamHandle stream = streams_[below(streams_.size())];
    if (capturing_ && (stream == captured_ || stream == side_)) return;
    shared_.device.synchronize_stream(stream);
  }

  void begin_route() {
    if (routed_.size() > 2 || shared_.allocator.settings().backend == Backend::Async) return;
    if (held_.empty() || below(2) == 0) held_.push_back(shared_.allocator.create_pool());
    const MempoolId pool = held_[below(held_.size())];
    shared_.allocator.begin_allocate_to_pool(
        pool, below(2) ? AllocationRoute::this_thread()
                       : AllocationRoute::on_stream(streams_[below(streams_.size())]));
    routed_.push_back(pool);
  }
  void end_route() {
    shared_.allocator.end_allocate_to_pool(routed_.back());
    routed_.pop_back();
  }

  void begin_capture() {
    if (capturing_ || !alone_ || shared_.allocator.settings().backend == Backend::Async) return;
    held_.push_back(shared_.allocator.create_pool());
    captured_ = streams_[0];
    side_ = streams_[1];
    shared_.device.begin_capture(captured_);
    shared_.device.wait_stream(side_, captured_);
    shared_.allocator.begin_allocate_to_pool(held_.back(),
                                             AllocationRoute::this_thread_on_stream(captured_));
    capture_pool_ = held_.back();
    capturing_ = true;
  }
  void end_capture() {
    if (!capturing_) return;
    shared_.allocator.end_allocate_to_pool(capture_pool_);
    shared_.device.end_capture(captured_);
    capturing_ = false;
  }

  void step() {
    const uint64_t dice = below(1000);
    if (dice < 430) {
      if (live_.size() < 300) return allocate();
      return release(below(live_.size()));
    }
    if (dice < 780) {
      if (!live_.empty()) release(below(2) ? live_.size() - 1 : below(live_.size()));
      return;
    }
    if (dice < 850) return live_.empty() ? allocate() : use();
    if (dice < 920) return live_.empty() ? allocate() : use_elsewhere();
    if (dice < 960) return shared_.device.advance();
    if (dice < 970) return synchronize();
    if (dice < 976) return begin_route();
    if (dice < 984) {
      if (!routed_.empty()) end_route();
      return;
    }
    if (dice < 987) {
      if (!held_.empty() && !capturing_ && routed_.empty()) {
        shared_.allocator.release_pool(held_.back());
        held_.pop_back();
      }
      return;
    }
    if (dice < 989) return static_cast<void>(shared_.allocator.empty_cache());
    if (dice < 990) return static_cast<void>(shared_.allocator.stats());
    if (dice < 991) return static_cast<void>(shared_.allocator.snapshot());
    if (dice < 993) {
      return shared_.allocator.set_memory_limit(below(2) ? AllocatorSettings::kNoLimit
                                                         : (100 + below(100)) * MiB);
    }
    if (dice < 995) return begin_capture();
    if (dice < 998) return end_capture();
    if (alone_ && dice == 999) CHECK_EMPTY(shared_.allocator.check_invariants());
  }

  Shared& shared_;
  std::vector<StreamHandle> streams_;
  std::mt19937_64 random_;
  const bool alone_;
  std::vector<Live> live_;
  std::vector<MempoolId> held_, routed_;
  bool capturing_ = false;
  StreamHandle captured_ = nullptr, side_ = nullptr;
  MempoolId capture_pool_;
};

/// One program; false if anything was wrong.
bool run(uint64_t seed, int threads, int64_t operations) {
  const int before = failures;
  std::mt19937_64 random(seed);
  SimulatedOptions options;
  options.memory = 256 * MiB;
  options.seed = seed;
  SimulatedDevice device(options);
  const char* settings = kSettings[random() % std::size(kSettings)];
  {
    CachingAllocator allocator(device, 0, parse_settings(settings));
    Shared shared{device, allocator, {}, true, 0};
    if (random() % 3 == 0) {
      allocator.record_history({.mode = HistoryMode::All,
                                .capture = []() noexcept { return AllocationContext(); },
                                .max_entries = 100});
    }
    const bool faulty = random() % 3 == 0;
    if (faulty) {
      shared.exact = false;
      device.fail_randomly(0.02, random() % 2 ? ApiCode::OutOfMemory : ApiCode::Failed);
    }
    std::vector<Player> players;
    for (int t = 0; t < threads; ++t) {
      std::vector<StreamHandle> streams;
      for (int s = 0; s < (threads == 1 ? 4 : 3); ++s) streams.push_back(device.create_stream());
      players.emplace_back(shared, std::move(streams), random(), threads == 1);
    }
    if (threads == 1) {
      players[0].play(operations);
    } else {
      std::vector<std::thread> running;
      for (Player& player : players) {
        running.emplace_back([&player, n = operations / threads] { player.play(n); });
      }
      for (std::thread& thread : running) thread.join();
    }
    device.clear_faults();
    CHECK_EMPTY(allocator.check_invariants());
    for (Player& player : players) player.finish();
    CHECK_EMPTY(allocator.check_invariants());
    device.synchronize_device();
    allocator.empty_cache();
    allocator.empty_cache();  // pools whose blocks became free just now
    CHECK_EMPTY(allocator.check_invariants());
    const MemoryStats stats = allocator.stats();
    CHECK(stats.allocated_bytes.all.current == 0 && stats.allocation.all.current == 0);
    CHECK(stats.active_bytes.all.current == 0 && stats.requested_bytes.all.current == 0);
    CHECK(stats.reserved_bytes.all.current == 0 && device.memory_in_use() == 0);
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
  if (failures != before) {
    std::printf("with VT_FUZZ_SEED=%llu, %d threads, %s\n", static_cast<unsigned long long>(seed),
                threads, settings);
  }
  return failures == before;
}

/// The same idea for page-locked memory.
bool run_pinned(uint64_t seed, int64_t operations) {
  const int before = failures;
  std::mt19937_64 random(seed);
  SimulatedOptions options;
  options.host_memory = 64 * MiB;
  options.seed = seed;
  SimulatedDevice device(options);
  {
    PinnedAllocator pinned(device, parse_settings(random() % 2 ? "" : "pinned_cache_limit_mb:8"));
    const StreamHandle streams[] = {nullptr, device.create_stream(), device.create_stream()};
    if (random() % 3 == 0) device.fail_randomly(0.02, ApiCode::OutOfMemory);
    std::vector<Allocation> live;
    LiveRanges ranges;
    for (int64_t i = 0; i < operations; ++i) {
      const uint64_t dice = random() % 100;
      if (dice < 45 && live.size() < 200) {
        try {
          const Allocation a = pinned.allocate(1 + random() % (random() % 8 ? 20000 : 4 * MiB));
          CHECK(ranges.add(address_of(a), a.nbytes));
          device.use_on_host(address_of(a), a.nbytes);
          live.push_back(a);
        } catch (const Error& e) {
          CHECK(e.kind() == ErrorKind::OutOfMemory);
        }
      } else if (dice < 80 && !live.empty()) {
        const size_t index = random() % live.size();
        ranges.remove(address_of(live[index]));
        give_back(live[index]);
        live[index] = live.back();
        live.pop_back();
      } else if (dice < 95 && !live.empty()) {
        const Allocation& a = live[random() % live.size()];
        const StreamHandle stream = streams[random() % 3];
        pinned.record_stream(a.context, stream);
        device.launch(stream, {{address_of(a), a.nbytes, false}});
      } else if (dice < 98) {
        device.advance();
      } else if (dice == 98) {
        CHECK_EMPTY(pinned.check_invariants());
      } else if (random() % 8 == 0) {
        pinned.empty_cache();
      }
    }
    device.clear_faults();
    for (const Allocation& a : live) give_back(a);
    CHECK(pinned.stats().allocated_bytes == 0);
    CHECK_EMPTY(pinned.check_invariants());
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
  if (failures != before) {
    std::printf("pinned, with VT_FUZZ_SEED=%llu\n", static_cast<unsigned long long>(seed));
  }
  return failures == before;
}

}  // namespace

int main() {
  uint64_t seed = environment_number("VT_FUZZ_SEED", 20260101);
  const auto total = static_cast<int64_t>(environment_number("VT_FUZZ_OPS", 1000000));
  constexpr int64_t kProgram = 10000;
  const auto start = std::chrono::steady_clock::now();
  std::printf("first seed %llu\n", static_cast<unsigned long long>(seed));
  int64_t done = 0;
  for (int64_t n = 0; done < total; ++n, ++seed, done += kProgram) {
    const bool well = n % 8 == 7
                          ? run_pinned(seed, kProgram)
                          : run(seed, n % 4 == 3 ? 2 + static_cast<int>(n / 4 % 3) : 1, kProgram);
    if (!well) break;
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%lld operations in %.1f s\n", static_cast<long long>(done), took.count());
  return finish("test_cuda_allocator_fuzz");
}
