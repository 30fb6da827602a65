// The caching allocator on the simulated device, policy by policy: reuse in stream order, splitting
// and merging, expandable segments, other streams, limits, the out-of-memory ladder.
#include "test_cuda_allocator.h"

#include <algorithm>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "core/host_wait.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

/// A device and its allocator; on the way out nothing may be misused, inconsistent or leaked.
struct Fixture {
  explicit Fixture(const char* settings = "", const SimulatedOptions& options = {})
      : device(options),
        allocator(std::make_unique<CachingAllocator>(device, 0, parse_settings(settings))) {}
  ~Fixture() {
    CHECK_EMPTY(allocator->check_invariants());
    allocator.reset();
    CHECK_EMPTY(device.misuse());
    CHECK_EMPTY(device.leaks());
  }
  Allocation get(size_t nbytes, StreamHandle stream = nullptr) {
    return allocator->allocate(nbytes, stream);
  }
  void write(const Allocation& a, StreamHandle stream) {
    device.launch(stream, {{address_of(a), a.nbytes, true}});
  }

  SimulatedDevice device;
  std::unique_ptr<CachingAllocator> allocator;
};

constexpr const char* kModes[] = {"expandable_segments:true", "expandable_segments:false"};

void blocks_are_aligned_and_apart() {
  for (const char* mode : kModes) {
    Fixture f(mode);
    std::map<uintptr_t, size_t> live;
    std::vector<Allocation> all;
    for (size_t nbytes : {1ul, 511ul, 512ul, 513ul, 4097ul, MiB - 1, MiB, MiB + 1, 7 * MiB,
                          10 * MiB, 33 * MiB + 5}) {
      for (int i = 0; i < 3; ++i) {
        const Allocation a = f.get(nbytes);
        CHECK(a.nbytes == nbytes && address_of(a) % 512 == 0);
        CHECK(CachingAllocator::block_size(a.context) >= nbytes);
        const auto next = live.lower_bound(address_of(a));
        CHECK(next == live.end() || address_of(a) + nbytes <= next->first);
        CHECK(next == live.begin() || std::prev(next)->second <= address_of(a));
        live[address_of(a)] = address_of(a) + nbytes;
        f.write(a, nullptr);
        all.push_back(a);
      }
    }
    CHECK_EMPTY(f.allocator->check_invariants());
    for (const Allocation& a : all) give_back(a);
    const Allocation none = f.get(0);
    CHECK(none.data == nullptr && none.release == nullptr);
  }
}

void steady_state_makes_no_driver_call() {
  for (const char* mode : kModes) {
    SimulatedOptions options;
    options.memory = 4096 * MiB;
    Fixture f(mode, options);
    const StreamHandle streams[] = {nullptr, f.device.create_stream()};
    int64_t after_second = 0;
    for (int step = 0; step < 6; ++step) {
      std::vector<Allocation> live;
      for (const StreamHandle stream : streams) {
        for (size_t i = 1; i <= 40; ++i) {
          live.push_back(f.get(i * 3000, stream));
          live.push_back(f.get(i * 700000, stream));
          f.write(live.back(), stream);
          if (i % 3 == 0) {
            give_back(live[live.size() / 2]);
            live.erase(live.begin() + static_cast<ptrdiff_t>(live.size() / 2));
          }
        }
      }
      for (const Allocation& a : live) give_back(a);
      if (step == 1) after_second = f.device.calls();
    }
    CHECK(f.device.calls() == after_second);
    const MemoryStats stats = f.allocator->stats();
    CHECK(stats.num_ooms == 0 && stats.num_alloc_retries == 0 && stats.num_sync_all_streams == 0);
    CHECK(stats.allocated_bytes.all.current == 0 && stats.allocated_bytes.all.peak > 0);
  }
}

void freed_memory_is_reused_at_once_on_its_stream_only() {
  for (const char* mode : kModes) {
    Fixture f(mode);
    const StreamHandle other = f.device.create_stream();
    for (size_t nbytes : {1000ul, 100 * KiB, 3 * MiB}) {
      const Allocation a = f.get(nbytes);
      f.write(a, nullptr);
      give_back(a);
      const Allocation b = f.get(nbytes, other);
      CHECK(b.data != a.data);
      CHECK(CachingAllocator::stream_of(b.context) == other);
      f.write(b, other);  // unordered with the work on the default stream
      const Allocation c = f.get(nbytes);
      CHECK(c.data == a.data);
      f.write(c, nullptr);
      give_back(b);
      give_back(c);
    }
  }
}

void blocks_split_and_merge() {
  for (const char* mode : kModes) {
    Fixture f(mode);
    for (size_t unit : {size_t{512}, 40 * KiB, 2 * MiB}) {
      std::vector<Allocation> parts;
      for (int i = 0; i < 8; ++i) parts.push_back(f.get(unit));
      for (int i : {1, 0, 7, 3, 5, 4, 2, 6}) give_back(parts[static_cast<size_t>(i)]);
      const int64_t calls = f.device.calls();
      const Allocation whole = f.get(unit * 8);  // fits only if the parts were merged
      CHECK(f.device.calls() - calls <= 2);      // at most a look at captures
      give_back(whole);
    }
  }
}

void fragments_cannot_strand_memory() {
  SimulatedOptions options;
  options.memory = 256 * MiB;
  const auto run = [&](const char* mode) {
    Fixture f(mode, options);
    std::vector<Allocation> live;
    for (int i = 0; i < 16; ++i) live.push_back(f.get(16 * MiB));
    for (size_t i = 0; i < 16; i += 2) give_back(live[i]);  // 128 MiB free, in pieces of 16
    bool fits = true;
    try {
      const Allocation big = f.get(112 * MiB);
      f.write(big, nullptr);
      give_back(big);
    } catch (const Error& e) {
      fits = false;
      CHECK(e.kind() == ErrorKind::OutOfMemory);
    }
    for (size_t i = 1; i < 16; i += 2) give_back(live[i]);
    return fits;
  };
  CHECK(run("expandable_segments:true"));
  // Plain segments of this size go back whole, so they manage as well ...
  CHECK(run("expandable_segments:false"));
  const auto pinned_down = [&](const char* mode) {
    Fixture f(mode, options);
    std::vector<Allocation> live;
    for (int i = 0; i < 120; ++i) live.push_back(f.get(2 * MiB));
    std::vector<Allocation> kept;
    for (size_t i = 0; i < live.size(); ++i) {
      if (i % 10 == 9) {
        kept.push_back(live[i]);  // one in each plain segment of 20 MiB
      } else {
        give_back(live[i]);
      }
    }
    const auto [kind, message] = error_of([&] { give_back(f.get(100 * MiB)); });
    for (const Allocation& a : kept) give_back(a);
    return message.empty();
  };
  // ... but not where a live block sits in each.
  CHECK(pinned_down("expandable_segments:true,expandable_page_mb:2"));
  CHECK(!pinned_down("expandable_segments:false"));
}

void other_streams_delay_reuse() {
  for (const char* mode : kModes) {
    Fixture f(mode);
    f.device.set_progress(0);
    const StreamHandle side = f.device.create_stream();
    const Allocation a = f.get(2 * MiB);
    f.write(a, nullptr);
    f.device.wait_stream(side, nullptr);
    f.device.launch(side, {{address_of(a), a.nbytes, false}});
    f.allocator->record_stream(a.context, side);
    f.allocator->record_stream(a.context, side);
    f.allocator->record_stream(a.context, nullptr);  // its own stream: nothing to wait for
    give_back(a);
    MemoryStats stats = f.allocator->stats();
    CHECK(stats.allocated_bytes.all.current == 0);
    CHECK(stats.active_bytes.all.current == static_cast<int64_t>(2 * MiB));
    const Allocation b = f.get(2 * MiB);
    CHECK(b.data != a.data);
    f.write(b, nullptr);
    CHECK(f.device.synchronize_stream(side).ok());
    const Allocation c = f.get(15 * MiB);  // looks at the events, as nothing cached fits
    const Allocation d = f.get(2 * MiB);
    CHECK(d.data == a.data);
    f.write(d, nullptr);
    for (const Allocation& x : {b, c, d}) give_back(x);
    stats = f.allocator->stats();
    CHECK(stats.active.all.current == 0 && stats.active.all.allocated == stats.active.all.freed);
  }
}

void a_capture_reuses_what_its_side_streams_used() {
  Fixture f;
  const StreamHandle main = f.device.create_stream(), side = f.device.create_stream();
  const MempoolId pool = f.allocator->create_pool();
  f.device.begin_capture(main);
  f.allocator->begin_allocate_to_pool(pool, AllocationRoute::this_thread_on_stream(main));
  f.device.wait_stream(side, main);
  uintptr_t first = 0;
  for (int i = 0; i < 100; ++i) {
    const Allocation a = f.get(12 * MiB, main);
    if (i == 0) first = address_of(a);
    CHECK(address_of(a) == first);  // no memory piles up while the capture goes on
    CHECK(CachingAllocator::pool_of(a.context) == pool);
    f.write(a, main);
    f.device.wait_stream(side, main);
    f.device.launch(side, {{address_of(a), a.nbytes, true}});
    f.allocator->record_stream(a.context, side);
    give_back(a);
  }
  f.allocator->end_allocate_to_pool(pool);
  f.device.end_capture(main);
  const Allocation eager = f.get(12 * MiB, main);
  CHECK(address_of(eager) != first && CachingAllocator::pool_of(eager.context).is_default());
  give_back(eager);
  CHECK(f.allocator->empty_cache() > 0);
  CHECK(f.device.memory_in_use() >= 12 * MiB);  // a graph may replay in the pool
  f.allocator->release_pool(pool);
  f.allocator->empty_cache();
  CHECK(f.device.memory_in_use() == 0);
}

void a_block_used_by_an_unrelated_capture_waits_for_its_end() {
  Fixture f;
  const StreamHandle captured = f.device.create_stream();
  const Allocation a = f.get(3 * MiB);
  f.device.begin_capture(captured);
  f.allocator->record_stream(a.context, captured);
  give_back(a);
  const Allocation b = f.get(3 * MiB);
  CHECK(b.data != a.data);
  // Memory runs out: whatever the ladder does, it must not touch the capture.
  const Allocation most = f.get(900 * MiB);
  CHECK(error_of([&] { f.get(900 * MiB); }).first == ErrorKind::OutOfMemory);
  CHECK(f.allocator->usage().at(0).pending == 3 * MiB);
  f.device.end_capture(captured);
  f.allocator->empty_cache();
  CHECK(f.allocator->usage().at(0).pending == 0);
  give_back(b);
  give_back(most);
}

void eager_work_before_a_capture_delays_reuse() {
  Fixture f;
  f.device.set_progress(0);
  const StreamHandle owner = f.device.create_stream(), side = f.device.create_stream();
  const Allocation a = f.get(3 * MiB, owner);
  f.write(a, owner);
  f.device.wait_stream(side, owner);
  f.device.launch(side, {{address_of(a), a.nbytes, false}});
  f.allocator->record_stream(a.context, side);
  f.device.begin_capture(side);
  give_back(a);  // an event recorded now would be one of the capture, and say nothing of the read
  f.device.end_capture(side);
  const Allocation b = f.get(3 * MiB, owner);
  CHECK(b.data != a.data);
  f.write(b, owner);
  CHECK(f.device.synchronize_stream(side).ok());
  const Allocation c = f.get(17 * MiB, owner);
  const Allocation d = f.get(3 * MiB, owner);
  CHECK(d.data == a.data);
  f.write(d, owner);
  for (const Allocation& x : {b, c, d}) give_back(x);
}

void the_ladder_frees_in_order() {
  SimulatedOptions options;
  options.memory = 128 * MiB;
  Fixture f("", options);
  const StreamHandle side = f.device.create_stream();
  // Pending on another stream: waiting for its event is enough.
  f.device.set_progress(0);
  Allocation a = f.get(100 * MiB);
  f.device.launch(side, {{address_of(a), a.nbytes, true}});
  f.allocator->record_stream(a.context, side);
  give_back(a);
  a = f.get(100 * MiB);
  f.write(a, nullptr);
  give_back(a);
  CHECK(f.allocator->stats().num_alloc_retries == 1);
  // Cached by another stream.
  a = f.get(100 * MiB, side);
  f.write(a, side);
  CHECK(f.allocator->stats().num_alloc_retries == 2);
  give_back(a);
  CHECK(f.allocator->empty_cache() >= 100 * MiB);
  // Cached by a private pool: kept while it is held, taken once nobody does.
  const MempoolId pool = f.allocator->create_pool();
  f.allocator->begin_allocate_to_pool(pool, AllocationRoute::this_thread());
  give_back(f.get(90 * MiB));
  f.allocator->end_allocate_to_pool(pool);
  auto [kind, message] = error_of([&] { f.get(90 * MiB); });
  CHECK(kind == ErrorKind::OutOfMemory);
  CHECK(contains(message, "Tried to allocate 90.00 MiB on cuda:0"));
  CHECK(contains(message, str("(0, ", pool.second, ")")));
  CHECK(contains(message, "largest free"));
  CHECK(f.allocator->stats().num_ooms == 1);
  f.allocator->release_pool(pool);
  a = f.get(90 * MiB);
  give_back(a);
  // The user's callback, called without locks held.
  const Allocation hoard = f.get(100 * MiB);
  int asked = 0;
  f.allocator->set_out_of_memory_callback([&](size_t nbytes) {
    CHECK(nbytes >= 64 * MiB);
    f.allocator->stats();
    if (asked++ > 0) return false;
    give_back(hoard);
    return true;
  });
  const Allocation b = f.get(64 * MiB);
  CHECK(asked == 1);
  CHECK(error_of([&] { f.get(80 * MiB); }).first == ErrorKind::OutOfMemory && asked == 2);
  f.allocator->set_out_of_memory_callback(nullptr);
  give_back(b);
}

/// How often the host said that it waits, and whether it waits now.
int waits = 0;
bool waiting = false;

void the_ladder_is_a_wait_of_the_host() {
  const auto begin = [] {
    CHECK(!waiting);
    waiting = true;
    ++waits;
    return static_cast<void*>(&waits);
  };
  const auto end = [](void* held) {
    CHECK(waiting && held == &waits);
    waiting = false;
  };
  SimulatedOptions options;
  options.memory = 128 * MiB;
  Fixture f("", options);
  set_host_wait_hooks({begin, end});
  const Allocation hoard = f.get(100 * MiB);
  CHECK(waits == 0);
  bool gives = true;
  f.allocator->set_out_of_memory_callback([&](size_t) {
    CHECK(!waiting && waits > 0);  // code of the user, which may need what was let go of
    if (gives) give_back(hoard);
    return std::exchange(gives, false);
  });
  const Allocation b = f.get(64 * MiB);
  CHECK(!waiting && waits == 2);
  CHECK(error_of([&] { f.get(80 * MiB); }).first == ErrorKind::OutOfMemory);
  CHECK(!waiting && waits == 3);
  f.allocator->set_out_of_memory_callback(nullptr);
  give_back(b);
  Fixture async("backend:async", options);
  CHECK(error_of([&] { async.get(256 * MiB); }).first == ErrorKind::OutOfMemory);
  CHECK(!waiting && waits == 4);
  set_host_wait_hooks({});
}

void limits_hold() {
  for (const char* mode : kModes) {
    Fixture f(mode);
    f.allocator->set_memory_limit(64 * MiB);
    auto [kind, message] = error_of([&] { f.get(65 * MiB); });
    CHECK(kind == ErrorKind::OutOfMemory && contains(message, "memory limit is 64.00 MiB"));
    const Allocation a = f.get(40 * MiB);
    CHECK(error_of([&] { f.get(40 * MiB); }).first == ErrorKind::OutOfMemory);
    f.allocator->set_memory_limit(AllocatorSettings::kNoLimit);
    const Allocation b = f.get(40 * MiB);
    f.allocator->set_memory_fraction(0.25);  // of 1 GiB
    CHECK(f.allocator->memory_limit() == 256 * MiB);
    CHECK(error_of([&] { f.get(200 * MiB); }).first == ErrorKind::OutOfMemory);
    CHECK(error_of([&] { f.allocator->set_memory_fraction(-0.1); }).first == ErrorKind::Value);
    CHECK(error_of([&] { f.allocator->set_memory_fraction(1.5); }).first == ErrorKind::Value);
    f.allocator->set_memory_fraction(0);  // what there is, and no more
    CHECK(error_of([&] { f.get(5 * MiB); }).first == ErrorKind::OutOfMemory);
    f.allocator->set_memory_fraction(1);
    give_back(a);
    give_back(b);
    CHECK(f.allocator->stats().reserved_bytes.all.peak <= static_cast<int64_t>(256 * MiB));
    // Absurd requests are refused with the same error, not with an overflow.
    for (size_t nbytes : {SIZE_MAX, SIZE_MAX - 511, size_t{1} << 62, size_t{1} << 45}) {
      CHECK(error_of([&] { f.get(nbytes); }).first == ErrorKind::OutOfMemory);
    }
  }
}

void large_blocks_above_the_split_limit_stay_whole() {
  Fixture f("expandable_segments:false,max_split_size_mb:64");
  const Allocation big = f.get(100 * MiB);
  give_back(big);
  const Allocation small = f.get(30 * MiB);  // would split a block above the limit
  CHECK(small.data != big.data);
  const Allocation close = f.get(95 * MiB);  // fits it closely
  CHECK(close.data == big.data);
  CHECK(CachingAllocator::block_size(close.context) == 100 * MiB);
  MemoryStats stats = f.allocator->stats();
  CHECK(stats.oversize_allocations.current == 1 && stats.oversize_segments.current == 1);
  CHECK(stats.max_split_size == static_cast<int64_t>(64 * MiB));
  give_back(close);
  give_back(small);
  CHECK(f.allocator->stats().oversize_allocations.current == 0);
}

void idle_segments_are_collected_above_the_threshold() {
  SimulatedOptions options;
  options.memory = 512 * MiB;
  for (const char* mode : kModes) {
    Fixture f(str(mode, ",garbage_collection_threshold:0.5,memory_limit_mb:400").c_str(), options);
    give_back(f.get(150 * MiB));
    // Past 200 MiB the idle memory goes before more is taken, without the ladder.
    const Allocation a = f.get(180 * MiB);
    CHECK(f.allocator->stats().reserved_bytes.all.current <= static_cast<int64_t>(200 * MiB));
    CHECK(f.allocator->stats().num_alloc_retries == 0);
    give_back(a);
  }
}

void sizes_round_up_as_told() {
  Fixture f("roundup_power2_divisions:[1:8,64:4,>:1]");
  const auto size_of = [&](size_t nbytes) {
    const Allocation a = f.get(nbytes);
    const size_t size = CachingAllocator::block_size(a.context);
    give_back(a);
    f.allocator->empty_cache();
    return size;
  };
  CHECK(f.allocator->settings().block_size(5000) == 5120);
  CHECK(f.allocator->settings().block_size(4096 * 1024 + 1) == 5 * MiB);
  CHECK(f.allocator->settings().block_size(65 * MiB) == 80 * MiB);
  CHECK(f.allocator->settings().block_size(129 * MiB) == 129 * MiB);
  CHECK(f.allocator->settings().block_size(64 * MiB) == 64 * MiB);
  CHECK(size_of(65 * MiB) == 80 * MiB);
}

void a_stream_can_be_given_up() {
  Fixture f;
  const StreamHandle side = f.device.create_stream();
  const Allocation kept = f.get(20 * MiB, side);
  give_back(f.get(200 * MiB, side));
  CHECK(f.device.memory_in_use() > 200 * MiB);
  f.write(kept, side);
  f.allocator->release_stream(side);
  CHECK(f.device.memory_in_use() < 40 * MiB);
  give_back(kept);
}

void no_virtual_memory_means_plain_segments() {
  SimulatedOptions options;
  options.virtual_memory = false;
  Fixture f("expandable_segments:true", options);
  give_back(f.get(5 * MiB));
  CHECK(f.device.calls(SimulatedCall::Allocate) == 1);
  CHECK(f.device.calls(SimulatedCall::ReserveRange) == 0);
}

}  // namespace

int main() {
  blocks_are_aligned_and_apart();
  steady_state_makes_no_driver_call();
  freed_memory_is_reused_at_once_on_its_stream_only();
  blocks_split_and_merge();
  fragments_cannot_strand_memory();
  other_streams_delay_reuse();
  a_capture_reuses_what_its_side_streams_used();
  a_block_used_by_an_unrelated_capture_waits_for_its_end();
  eager_work_before_a_capture_delays_reuse();
  the_ladder_frees_in_order();
  the_ladder_is_a_wait_of_the_host();
  limits_hold();
  large_blocks_above_the_split_limit_stay_whole();
  idle_segments_are_collected_above_the_threshold();
  sizes_round_up_as_told();
  a_stream_can_be_given_up();
  no_virtual_memory_means_plain_segments();
  return finish("test_cuda_allocator_policies");
}
