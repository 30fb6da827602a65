// While the host waits for a device no lock is held that others need: neither that of the embedding
// language (HostWait), nor that of a pool. And what happens to the pools meanwhile is minded.
#include "test_cuda_allocator.h"

#include <chrono>
#include <functional>
#include <future>
#include <thread>

#include "core/host_wait.h"
#include "cuda/allocator/pinned_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

/// Stands for the lock of the embedding language, which the test's own thread holds.
thread_local bool holds_language = false;

struct Language {
  Language() {
    set_host_wait_hooks({[]() -> void* {
                           if (!holds_language) return nullptr;
                           holds_language = false;
                           return &holds_language;
                         },
                         [](void*) { holds_language = true; }});
    holds_language = true;
  }
  ~Language() {
    set_host_wait_hooks({});
    holds_language = false;
  }
};

/// Runs `other` on another thread while the device is waited for, each time; whether it always got
/// to its end meanwhile.
class Meanwhile {
 public:
  Meanwhile(SimulatedDevice& device, std::function<void()> other)
      : device_(device), other_(std::move(other)) {
    device_.set_wait_hook([this] { wait(); });
  }
  ~Meanwhile() {
    device_.set_wait_hook({});
    CHECK(waits_ > 0);
    for (std::thread& thread : late_) thread.join();
  }

 private:
  void wait() {
    if (std::this_thread::get_id() != self_) return;
    ++waits_;
    CHECK(!holds_language);
    std::promise<void> done;
    std::future<void> future = done.get_future();
    std::thread thread([this, done = std::move(done)]() mutable {
      other_();
      done.set_value();
    });
    const bool in_time = future.wait_for(std::chrono::seconds(3)) == std::future_status::ready;
    CHECK(in_time);
    if (in_time)
      thread.join();
    else
      late_.push_back(std::move(thread));  // goes on once the wait is over
  }

  SimulatedDevice& device_;
  std::function<void()> other_;
  std::thread::id self_ = std::this_thread::get_id();
  int waits_ = 0;
  std::vector<std::thread> late_;
};

SimulatedOptions small_device() {
  SimulatedOptions options;
  options.memory = options.host_memory = 64 * MiB;
  return options;
}

/// Others allocate and free in the pool, on the stream, that the first thread waits for.
void use(SimulatedDevice& device, CachingAllocator& allocator, StreamHandle stream) {
  const Allocation a = allocator.allocate(1000, stream);
  device.launch(stream, {{address_of(a), a.nbytes, true}});
  give_back(a);
}

void the_ladder_holds_no_lock(const char* settings) {
  SimulatedDevice device(small_device());
  device.set_progress(0);
  const StreamHandle side = device.create_stream();
  {
    const Language language;
    CachingAllocator allocator(device, 0, parse_settings(settings));
    use(device, allocator, nullptr);
    const Allocation a = allocator.allocate(40 * MiB, nullptr);
    device.launch(side, {{address_of(a), a.nbytes, true}});
    allocator.record_stream(a.context, side);
    give_back(a);
    {
      const Meanwhile other(device, [&] { use(device, allocator, nullptr); });
      const Allocation b = allocator.allocate(40 * MiB, nullptr);  // waits for the side stream
      device.launch(nullptr, {{address_of(b), b.nbytes, true}});
      give_back(b);
      give_back(allocator.allocate(40 * MiB, side));  // what is cached on the first makes room
    }
    CHECK(holds_language);
    CHECK_EMPTY(allocator.check_invariants());
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
}

void garbage_is_collected_without_locks(const char* settings) {
  SimulatedDevice device(small_device());
  device.set_progress(0);
  {
    const Language language;
    CachingAllocator allocator(device, 0, parse_settings(settings));
    for (const size_t nbytes : {12 * MiB, 14 * MiB}) {
      const Allocation a = allocator.allocate(nbytes, nullptr);
      device.launch(nullptr, {{address_of(a), a.nbytes, true}});
      give_back(a);
    }
    {
      const Meanwhile other(device, [&] { use(device, allocator, nullptr); });
      give_back(allocator.allocate(20 * MiB, nullptr));
    }
    CHECK(holds_language);
    CHECK_EMPTY(allocator.check_invariants());
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
}

/// What another thread frees while the host waits is younger than the wait, and stays.
void what_is_freed_during_the_wait_stays() {
  SimulatedDevice device;
  device.set_progress(0);
  {
    CachingAllocator allocator(device, 0, parse_settings("expandable_segments:false"));
    const Allocation early = allocator.allocate(30 * MiB, nullptr);
    const Allocation late = allocator.allocate(40 * MiB, nullptr);
    give_back(early);
    int turn = 0;
    const Meanwhile other(device, [&] {
      if (turn++ > 0) return;
      device.launch(nullptr, {{address_of(late), late.nbytes, true}});
      give_back(late);
    });
    CHECK(allocator.empty_cache() == 30 * MiB);
    CHECK(allocator.empty_cache() == 40 * MiB);
  }
  CHECK_EMPTY(device.misuse());
}

void pinned_memory_is_waited_for_without_locks() {
  SimulatedDevice device(small_device());
  device.set_progress(0);
  const StreamHandle side = device.create_stream();
  {
    const Language language;
    PinnedAllocator pinned(device, {});
    const Allocation a = pinned.allocate(40 * MiB);
    device.launch(side, {{address_of(a), a.nbytes, false}});
    pinned.record_stream(a.context, side);
    give_back(a);
    {
      const Meanwhile other(device, [&] { give_back(pinned.allocate(1000)); });
      give_back(pinned.allocate(60 * MiB));
    }
    CHECK(holds_language);
    CHECK_EMPTY(pinned.check_invariants());
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
}

/// While the memory of a pool out of use is given back, another pool comes to stand in its place,
/// held: graphs replay in it.
void a_pool_that_took_another_ones_place_keeps_its_memory() {
  SimulatedDevice device;
  {
    CachingAllocator allocator(device, 0, {});
    const auto cache_in = [&](MempoolId pool) {
      allocator.begin_allocate_to_pool(pool, AllocationRoute::on_stream(nullptr));
      give_back(allocator.allocate(3 * MiB, nullptr));
      allocator.end_allocate_to_pool(pool);
    };
    for (int i = 0; i < 3; ++i) {
      const MempoolId pool = allocator.create_pool();
      cache_in(pool);
      allocator.release_pool(pool);
    }
    std::vector<MempoolId> held;
    {
      bool first = true;
      const Meanwhile other(device, [&] {
        if (!std::exchange(first, false)) return;
        allocator.empty_cache();  // all three, whose places are free after it
        for (int i = 0; i < 3; ++i) {
          held.push_back(allocator.create_pool());
          cache_in(held.back());
        }
      });
      allocator.empty_cache();
    }
    size_t kept = 0;
    for (const PoolUsage& usage : allocator.usage()) {
      if (!usage.pool.is_default()) kept += usage.reserved >= 3 * MiB;
    }
    CHECK(kept == 3);
    for (const MempoolId pool : held) allocator.release_pool(pool);
    CHECK_EMPTY(allocator.check_invariants());
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
}

/// Garbage collection leaves pools alone that somebody holds.
void held_pools_are_no_garbage() {
  SimulatedDevice device(small_device());
  CachingAllocator allocator(device, 0, parse_settings("garbage_collection_threshold:0.1"));
  const MempoolId pool = allocator.create_pool();
  allocator.begin_allocate_to_pool(pool, AllocationRoute::on_stream(nullptr));
  for (const size_t nbytes : {8 * MiB, 14 * MiB, 18 * MiB}) {
    const Allocation a = allocator.allocate(nbytes, nullptr);
    give_back(a);
    give_back(allocator.allocate(100, nullptr));
  }
  allocator.end_allocate_to_pool(pool);
  CHECK(device.calls(SimulatedCall::Unmap) == 0);
  allocator.release_pool(pool);
}

void a_stream_given_up_is_forgotten() {
  SimulatedDevice device;
  device.set_progress(0);
  const StreamHandle side = device.create_stream();
  CachingAllocator allocator(device, 0, {});
  use(device, allocator, side);
  const Allocation a = allocator.allocate(3 * MiB, nullptr);
  device.launch(side, {{address_of(a), a.nbytes, true}});
  allocator.record_stream(a.context, side);
  device.fail_nth_call(SimulatedCall::CreateEvent, 1, ApiCode::Failed);  // made up for later
  give_back(a);
  device.clear_faults();
  allocator.release_stream(side);
  for (const PoolUsage& usage : allocator.usage()) {
    CHECK(usage.pending == 0);
    CHECK(usage.stream != side || usage.reserved == 0);
  }
  CHECK_EMPTY(device.misuse());
}

void the_drivers_pool_is_trimmed() {
  SimulatedDevice device;
  {
    const Language language;
    CachingAllocator allocator(device, 0, parse_settings("backend:async"));
    const Allocation a = allocator.allocate(30 * MiB, nullptr);
    const Allocation b = allocator.allocate(10 * MiB, nullptr);
    give_back(a);
    CHECK(device.memory_in_use() == 40 * MiB);  // the driver keeps it
    CHECK(allocator.empty_cache() == 30 * MiB);
    CHECK(device.memory_in_use() == 10 * MiB);
    device.fail_nth_call(SimulatedCall::TrimAsync, 1, ApiCode::Failed);
    give_back(b);
    CHECK(allocator.empty_cache() == 0 && allocator.empty_cache() == 10 * MiB);
  }
  CHECK(device.memory_in_use() == 0);
  CHECK_EMPTY(device.misuse());
}

/// Every single call of a program fails in turn; requests that are refused are skipped.
void every_call_of_pinned_memory_fails_in_turn() {
  const auto attempt = [](int64_t fail_at, ApiCode code, int* refused) {
    SimulatedDevice device(small_device());
    const StreamHandle side = device.create_stream(), other = device.peer().create_stream();
    int64_t calls = 0;
    {
      PinnedAllocator pinned(device, parse_settings("pinned_cache_limit_mb:30"));
      const int64_t before = device.calls();
      if (fail_at > 0) device.fail_nth_call(fail_at, code);
      for (int round = 0; round < 2; ++round) {
        for (const size_t nbytes : {1000ul, 3 * MiB, 20 * MiB, 25 * MiB, 40 * MiB, 60 * MiB}) {
          try {
            const Allocation a = pinned.allocate(nbytes);
            device.use_on_host(address_of(a), nbytes);
            if (round == 0) {
              device.launch(side, {{address_of(a), nbytes, false}});
              pinned.record_stream(a.context, side);
            } else {
              device.peer().launch(other, {{address_of(a), nbytes, false}});
              pinned.record_stream(a.context, other, device.peer());
            }
            give_back(a);
          } catch (const Error& e) {
            CHECK(e.kind() == ErrorKind::OutOfMemory || e.kind() == ErrorKind::Runtime);
            CHECK(contains(e.message(), "bytes of pinned host memory"));
            ++*refused;
          }
          CHECK_EMPTY(pinned.check_invariants());
        }
      }
      calls = device.calls() - before;
      device.clear_faults();
      CHECK(pinned.stats().allocated_bytes == 0);
      give_back(pinned.allocate(60 * MiB));  // usable in full
      pinned.empty_cache();
      CHECK_EMPTY(pinned.check_invariants());
      CHECK(pinned.stats().cached_bytes == 0 && pinned.stats().pending_bytes == 0);
    }
    CHECK_EMPTY(device.misuse());
    CHECK_EMPTY(device.leaks());
    return calls;
  };
  int refused = 0;
  const int64_t calls = attempt(0, ApiCode::Failed, &refused);
  CHECK(calls > 20 && refused == 0);
  for (const ApiCode code : {ApiCode::Failed, ApiCode::OutOfMemory}) {
    for (int64_t n = 1; n <= calls; ++n) {
      const int before = failures;
      attempt(n, code, &refused);
      if (failures != before) {
        std::printf("with call %lld of pinned memory failing\n", static_cast<long long>(n));
        return;
      }
    }
  }
  CHECK(refused > 0);
  std::printf("pinned memory: %lld calls failed in turn, twice; %d were felt\n",
              static_cast<long long>(calls), refused);
}

}  // namespace

int main() {
  for (const char* settings : {"expandable_segments:true", "expandable_segments:false"})
    the_ladder_holds_no_lock(settings);
  for (const char* settings : {"garbage_collection_threshold:0.5",
                               "garbage_collection_threshold:0.5,expandable_segments:false"})
    garbage_is_collected_without_locks(settings);
  what_is_freed_during_the_wait_stays();
  pinned_memory_is_waited_for_without_locks();
  a_pool_that_took_another_ones_place_keeps_its_memory();
  held_pools_are_no_garbage();
  a_stream_given_up_is_forgotten();
  the_drivers_pool_is_trimmed();
  every_call_of_pinned_memory_fails_in_turn();
  return finish("test_cuda_allocator_waits");
}
