// Private pools: who holds them, and which allocations go to them.
#include <algorithm>

#include "core/error.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {
namespace {

std::atomic<uint64_t> last_pool{0};

std::string pool_name(MempoolId pool) {
  return str("memory pool (", pool.first, ", ", pool.second, ")");
}

}  // namespace

MempoolId new_mempool_id(bool user) {
  const uint64_t number = ++last_pool;
  return user ? MempoolId{number, 0} : MempoolId{0, number};
}

MempoolId CachingAllocator::new_pool(bool user) {
  const MempoolId id = new_mempool_id(user);
  const std::lock_guard lock(pools_mutex_);
  private_pools_[id].use_count = 1;
  return id;
}
MempoolId CachingAllocator::create_pool() { return new_pool(false); }
MempoolId CachingAllocator::create_user_pool() { return new_pool(true); }

void CachingAllocator::check_exists(MempoolId pool, const char* function) const {
  check_value(private_pools_.contains(pool), function, ": ", pool_name(pool),
              " of cuda:", core_->device_index,
              pool.is_default() ? " is the default pool" : " does not exist",
              "; a pool lives from create_pool until its last use is released");
}

void CachingAllocator::hold_pool(MempoolId pool) {
  check_value(!pool.is_default(), "hold_pool: (0, 0) is the default pool, which nobody holds");
  if (core_->settings.backend == Backend::Async) {
    fail(ErrorKind::NotImplemented,
         "memory pools need the native allocator; remove backend:async from VT_CUDA_ALLOC");
  }
  const std::lock_guard lock(pools_mutex_);
  ++private_pools_[pool].use_count;
}

void CachingAllocator::retain_pool(MempoolId pool) {
  const std::lock_guard lock(pools_mutex_);
  check_exists(pool, "retain_pool");
  ++private_pools_[pool].use_count;
}

void CachingAllocator::end_use(MempoolId pool) {
  const auto found = private_pools_.find(pool);
  if (--found->second.use_count == 0) private_pools_.erase(found);
}

void CachingAllocator::release_pool(MempoolId pool) {
  {
    const std::lock_guard lock(pools_mutex_);
    check_exists(pool, "release_pool");
    const auto routes = std::count_if(routes_.begin(), routes_.end(),
                                      [&](const ActiveRoute& r) { return r.pool == pool; });
    check_value(private_pools_[pool].use_count > routes, "release_pool: ", pool_name(pool),
                " is only held by begin_allocate_to_pool; end_allocate_to_pool releases it");
    end_use(pool);
  }
  retire_empty_pools();
}

int CachingAllocator::use_count(MempoolId pool) const {
  const std::lock_guard lock(pools_mutex_);
  const auto found = private_pools_.find(pool);
  return found == private_pools_.end() ? 0 : found->second.use_count;
}

void CachingAllocator::begin_allocate_to_pool(MempoolId pool, const AllocationRoute& route) {
  if (core_->settings.backend == Backend::Async) {
    fail(ErrorKind::NotImplemented,
         "memory pools need the native allocator; remove backend:async from VT_CUDA_ALLOC");
  }
  const std::lock_guard lock(pools_mutex_);
  check_exists(pool, "begin_allocate_to_pool");
  routes_.push_back({pool, route, std::this_thread::get_id()});
  ++private_pools_[pool].use_count;
  next_epoch();
}

void CachingAllocator::end_allocate_to_pool(MempoolId pool) {
  {
    const std::lock_guard lock(pools_mutex_);
    const std::thread::id self = std::this_thread::get_id();
    auto found = std::find_if(routes_.rbegin(), routes_.rend(), [&](const ActiveRoute& r) {
      return r.pool == pool && r.begun_by == self;
    });
    if (found == routes_.rend()) {
      found = std::find_if(routes_.rbegin(), routes_.rend(),
                           [&](const ActiveRoute& r) { return r.pool == pool; });
    }
    check_value(found != routes_.rend(), "end_allocate_to_pool: nothing is allocated to ",
                pool_name(pool), " on cuda:", core_->device_index);
    routes_.erase(std::next(found).base());
    end_use(pool);
    next_epoch();
  }
  retire_empty_pools();
}

/// Takes the stream pools of pools that nobody holds out of use once they are empty.
void CachingAllocator::retire_empty_pools() {
  const std::lock_guard lock(pools_mutex_);
  bool changed = false;
  for (auto it = pool_by_key_.begin(); it != pool_by_key_.end();) {
    const MempoolId id = it->first.first;
    StreamPool* pool = it->second;
    bool empty = false;
    if (!id.is_default() && !private_pools_.contains(id)) {
      const std::lock_guard pool_lock(pool->lock);
      if (pool->live_blocks == 0 && !pool->has_memory()) {
        empty = true;
        retired_counters_.add(pool->counters);
        pool->retire();
      }
    }
    if (!empty) {
      ++it;
      continue;
    }
    retired_.push_back(pool);  // has room since the pool was made
    it = pool_by_key_.erase(it);
    changed = true;
  }
  if (changed) next_epoch();
}

}  // namespace vt::cuda
