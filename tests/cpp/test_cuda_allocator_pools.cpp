// Private pools: routes by thread and stream, sharing, use counts, and what happens to memory that
// is left in a pool that nobody holds.
#include "test_cuda_allocator.h"

#include <set>
#include <thread>
#include <vector>

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

struct Fixture {
  explicit Fixture(const char* settings = "")
      : allocator(std::make_unique<CachingAllocator>(device, 0, parse_settings(settings))) {}
  ~Fixture() {
    CHECK_EMPTY(allocator->check_invariants());
    allocator.reset();
    CHECK_EMPTY(device.misuse());
    CHECK_EMPTY(device.leaks());
  }
  MempoolId pool_for(StreamHandle stream) {
    const Allocation a = allocator->allocate(1000, stream);
    const MempoolId id = CachingAllocator::pool_of(a.context);
    give_back(a);
    return id;
  }

  SimulatedDevice device;
  std::unique_ptr<CachingAllocator> allocator;
};

void routes_choose_by_thread_and_stream() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const StreamHandle a = f.device.create_stream(), b = f.device.create_stream();
  const MempoolId mine = allocator.create_pool(), streams = allocator.create_user_pool();
  CHECK(mine.first == 0 && mine.second != 0 && streams.first != 0 && streams.second == 0);
  const auto elsewhere = [&](StreamHandle stream) {
    MempoolId id;
    std::thread([&] { id = f.pool_for(stream); }).join();
    return id;
  };
  CHECK(f.pool_for(a).is_default());
  allocator.begin_allocate_to_pool(mine, AllocationRoute::this_thread());
  CHECK(f.pool_for(a) == mine && f.pool_for(nullptr) == mine);
  CHECK(elsewhere(a).is_default());
  allocator.begin_allocate_to_pool(streams, AllocationRoute::on_stream(b));
  CHECK(f.pool_for(b) == streams && elsewhere(b) == streams);  // the route begun last wins
  CHECK(f.pool_for(a) == mine && elsewhere(a).is_default());
  allocator.end_allocate_to_pool(streams);
  CHECK(f.pool_for(b) == mine && elsewhere(b).is_default());
  allocator.end_allocate_to_pool(mine);
  allocator.begin_allocate_to_pool(mine, AllocationRoute::this_thread_on_stream(a));
  CHECK(f.pool_for(a) == mine && f.pool_for(b).is_default() && elsewhere(a).is_default());
  std::thread([&] { allocator.end_allocate_to_pool(mine); }).join();  // from another thread
  CHECK(f.pool_for(a).is_default());
  allocator.release_pool(mine);
  allocator.release_pool(streams);
}

void pools_are_shared_by_handle() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const StreamHandle stream = f.device.create_stream();
  const MempoolId pool = allocator.create_pool();
  const auto capture = [&] {
    f.device.begin_capture(stream);
    allocator.begin_allocate_to_pool(pool, AllocationRoute::on_stream(stream));
    const Allocation a = allocator.allocate(30 * MiB, stream);
    f.device.launch(stream, {{address_of(a), a.nbytes, true}});
    give_back(a);
    allocator.end_allocate_to_pool(pool);
    f.device.end_capture(stream);
    return address_of(a);
  };
  const uintptr_t first = capture();
  allocator.retain_pool(pool);
  CHECK(capture() == first);  // the second graph works in the first one's memory
  CHECK(allocator.use_count(pool) == 2);
  allocator.release_pool(pool);
  allocator.empty_cache();
  CHECK(f.device.memory_in_use() >= 30 * MiB);
  CHECK(allocator.usage().size() == 1 && allocator.usage()[0].use_count == 1);
  CHECK(allocator.usage()[0].cached >= 30 * MiB);
  allocator.release_pool(pool);
  CHECK(allocator.use_count(pool) == 0);
  allocator.empty_cache();
  CHECK(f.device.memory_in_use() == 0);
  CHECK(allocator.usage().empty());
}

void a_handle_names_a_pool_before_it_exists() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const MempoolId id = new_mempool_id(true);
  CHECK(id.second == 0 && id != new_mempool_id(true) && allocator.use_count(id) == 0);
  allocator.hold_pool(id);
  allocator.hold_pool(id);
  CHECK(allocator.use_count(id) == 2);
  allocator.begin_allocate_to_pool(id, AllocationRoute::this_thread());
  const Allocation a = allocator.allocate(30 * MiB, nullptr);
  const uintptr_t first = address_of(a);
  give_back(a);
  allocator.end_allocate_to_pool(id);
  allocator.release_pool(id);
  allocator.release_pool(id);
  CHECK(allocator.use_count(id) == 0);
  allocator.hold_pool(id);  // what it cached is still there
  allocator.begin_allocate_to_pool(id, AllocationRoute::this_thread());
  const Allocation b = allocator.allocate(30 * MiB, nullptr);
  CHECK(address_of(b) == first && CachingAllocator::pool_of(b.context) == id);
  give_back(b);
  allocator.end_allocate_to_pool(id);
  allocator.release_pool(id);
  allocator.empty_cache();
  CHECK(error_of([&] { allocator.hold_pool({}); }).first == ErrorKind::Value);
}

void live_blocks_keep_a_released_pool() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const MempoolId pool = allocator.create_pool();
  allocator.begin_allocate_to_pool(pool, AllocationRoute::this_thread());
  const Allocation output = allocator.allocate(30 * MiB, nullptr);
  give_back(allocator.allocate(50 * MiB, nullptr));
  allocator.end_allocate_to_pool(pool);
  allocator.release_pool(pool);
  allocator.empty_cache();
  CHECK(f.device.memory_in_use() >= 30 * MiB && f.device.memory_in_use() < 50 * MiB);
  f.device.launch(nullptr, {{address_of(output), output.nbytes, true}});
  CHECK(CachingAllocator::pool_of(output.context) == pool);
  give_back(output);
  allocator.empty_cache();
  CHECK(f.device.memory_in_use() == 0);
}

void many_pools_come_and_go() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  for (int i = 0; i < 500; ++i) {
    const MempoolId pool = allocator.create_pool();
    allocator.begin_allocate_to_pool(pool, AllocationRoute::this_thread());
    const Allocation a = allocator.allocate(3 * MiB, nullptr);
    CHECK(CachingAllocator::pool_of(a.context) == pool);
    allocator.end_allocate_to_pool(pool);
    allocator.release_pool(pool);
    give_back(a);
    if (i % 7 == 0) allocator.empty_cache();
  }
  allocator.empty_cache();
  const MemoryStats stats = allocator.stats();  // counts survive the pools
  CHECK(stats.allocation.all.allocated == 500 && stats.allocation.all.freed == 500);
}

void misuse_is_refused_by_name() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const auto refused = [&](auto&& call, const char* what) {
    const auto [kind, message] = error_of(call);
    CHECK(kind == ErrorKind::Value && contains(message, what));
  };
  const MempoolId gone = allocator.create_pool();
  allocator.release_pool(gone);
  refused([&] { allocator.release_pool(gone); }, "release_pool: memory pool (0, ");
  refused([&] { allocator.retain_pool(gone); }, "does not exist");
  refused([&] { allocator.begin_allocate_to_pool(gone, {}); }, "begin_allocate_to_pool");
  refused([&] { allocator.begin_allocate_to_pool({}, {}); }, "is the default pool");
  refused([&] { allocator.end_allocate_to_pool(gone); }, "nothing is allocated to");
  const MempoolId pool = allocator.create_pool();
  allocator.begin_allocate_to_pool(pool, {});
  allocator.release_pool(pool);
  refused([&] { allocator.release_pool(pool); }, "only held by begin_allocate_to_pool");
  allocator.end_allocate_to_pool(pool);
  CHECK(allocator.use_count(pool) == 0);

  SimulatedDevice device;
  CachingAllocator async(device, 0, parse_settings("backend:async"));
  const MempoolId other = async.create_pool();
  CHECK(error_of([&] { async.begin_allocate_to_pool(other, {}); }).first ==
        ErrorKind::NotImplemented);
}

void threads_share_an_allocator() {
  Fixture f;
  CachingAllocator& allocator = *f.allocator;
  const StreamHandle common = f.device.create_stream();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const MempoolId pool = allocator.create_pool();
      std::vector<Allocation> live;
      for (int i = 0; i < 2000; ++i) {
        if (i % 50 == 0) allocator.begin_allocate_to_pool(pool, AllocationRoute::this_thread());
        live.push_back(allocator.allocate(static_cast<size_t>(1 + i % 40) * 300, common));
        CHECK(CachingAllocator::pool_of(live.back().context) == (i % 50 < 25 ? pool : MempoolId{}));
        if (i % 50 == 24) allocator.end_allocate_to_pool(pool);
        if (i % 200 == 100 + t) allocator.empty_cache();
        if (live.size() > 30) {
          for (const Allocation& a : live) give_back(a);
          live.clear();
        }
      }
      for (const Allocation& a : live) give_back(a);
      allocator.release_pool(pool);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(allocator.stats().allocation.all.allocated == 8000);
  CHECK(allocator.stats().allocation.all.current == 0);
}

}  // namespace

int main() {
  routes_choose_by_thread_and_stream();
  pools_are_shared_by_handle();
  a_handle_names_a_pool_before_it_exists();
  live_blocks_keep_a_released_pool();
  many_pools_come_and_go();
  misuse_is_refused_by_name();
  threads_share_an_allocator();
  return finish("test_cuda_allocator_pools");
}
