// What happens when an allocation finds nothing cached: growth, and the ladder of ways to free
// memory when the device or a limit refuses it.
#include <algorithm>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "core/host_wait.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {

Block* CachingAllocator::try_allocate(const Resolved& target, BlockKind kind, size_t size,
                                      size_t nbytes, AllocationContext& context, ApiStatus* status,
                                      bool* stale) {
  StreamPool& pool = *target.pool;
  std::unique_lock lock(pool.lock);
  *stale = pool.serial != target.serial;
  if (*stale) return nullptr;
  pool.process_pending();  // what fails here stays pending
  if (kind == BlockKind::Small) pool.flush_quick();
  Block* block = pool.take(kind, size, nbytes);
  if (const size_t excess = block ? 0 : garbage(pool, size)) {
    const uint64_t old = pool.average_free_clock();
    lock.unlock();
    {
      const HostWait waiting;
      release_cached(target, excess, old);
    }
    lock.lock();
    *stale = pool.serial != target.serial;
    if (*stale) return nullptr;
    block = pool.take(kind, size, nbytes);  // others may have freed some meanwhile
  }
  if (!block) {
    *status = pool.grow(kind, size, context);
    if (!status->ok()) return nullptr;
    block = pool.take(kind, size, nbytes);
  }
  if (block && core_->history.on()) {
    block->context = context;
    core_->history.record(TraceAction::Alloc, block->address, block->size, pool.stream(), pool.id(),
                          context);
  }
  return block;
}

/// The bytes that are to be given back before the pool grows by `size`, as the threshold asks.
/// Pools that somebody holds keep theirs: graphs replay in them.
size_t CachingAllocator::garbage(const StreamPool& pool, size_t size) const {
  const double threshold = core_->settings.garbage_collection_threshold;
  if (threshold <= 0 || !pool.id().is_default() || pool.cached_bytes() == 0) return 0;
  const size_t cap = std::min(core_->limit.load(), core_->total_memory);
  const auto aim = static_cast<size_t>(threshold * static_cast<double>(cap));
  const size_t wanted = core_->claimed() + size;
  return wanted <= aim ? 0 : wanted - aim;
}

Allocation CachingAllocator::allocate_slowly(size_t nbytes, size_t size, StreamHandle stream,
                                             AllocationContext context) {
  const BlockKind kind = size <= kSmallLimit ? BlockKind::Small : BlockKind::Large;
  enum Rung { Grow, WaitForEvents, ReleaseCached, CollectPools, AskUser, GiveUp };
  // From the first refusal on the host waits: for the device, and for other threads on the ladder.
  std::optional<HostWait> waiting;
  std::unique_lock ladder(ladder_mutex_, std::defer_lock);
  ApiStatus status;
  for (int rung = Grow;;) {
    bool stale = false;
    Block* block = try_allocate(route(stream), kind, size, nbytes, context, &status, &stale);
    if (block) return hand_over(block, nbytes);
    if (stale) continue;
    if (status.code != ApiCode::OutOfMemory) {
      fail("cuda:", core_->device_index, ": cannot allocate ", nbytes,
           " bytes: ", status.code == ApiCode::Dead ? "the CUDA context is gone" : status.message);
    }
    if (rung == Grow) {
      core_->alloc_retries.fetch_add(1, std::memory_order_relaxed);
      waiting.emplace();
      ladder.lock();
    }
    ++rung;
    if (rung == WaitForEvents) wait_for_pending();
    if (rung == ReleaseCached) release_cached(false);
    if (rung == CollectPools) release_cached(true);
    if (rung == AskUser) {
      ladder.unlock();
      waiting.reset();
      if (call_out_of_memory_callback(nbytes)) {
        waiting.emplace();
        ladder.lock();
        wait_for_pending();
        release_cached(false);
        release_cached(true);
      } else {
        rung = GiveUp;
      }
    }
    if (rung == GiveUp) {
      if (ladder) ladder.unlock();
      waiting.reset();
      throw_out_of_memory(nbytes, status, stream, std::move(context));
    }
  }
}

void CachingAllocator::wait_for_pending() {
  core_->sync_all_streams.fetch_add(1, std::memory_order_relaxed);
  for (const Resolved& target : pools()) {
    std::unique_lock lock(target.pool->lock);
    if (target.pool->serial == target.serial) target.pool->wait_pending(lock);
  }
}

void CachingAllocator::process_pending() {
  if (in_forked_child()) return;
  for (const Resolved& target : pools()) {
    const std::lock_guard lock(target.pool->lock);
    if (target.pool->serial == target.serial) target.pool->process_pending();
  }
}

/// Gives back what a pool has cached, waiting for its stream without the pool's lock.
size_t CachingAllocator::release_cached(const Resolved& target, size_t most, uint64_t older_than) {
  StreamPool& pool = *target.pool;
  uint64_t mark = 0;
  StreamHandle stream = nullptr;
  {
    const std::lock_guard pools(pools_mutex_);
    const std::lock_guard lock(pool.lock);
    if (pool.serial != target.serial) return 0;
    // Whoever holds the pool since may have captured graphs that replay in what is cached. One who
    // comes to hold it after this only frees what is younger than the mark.
    if (private_pools_.contains(pool.id())) return 0;
    mark = pool.mark_cached();
    stream = pool.stream();
  }
  // What the stream still runs may use the memory.
  if (mark == 0 || !core_->device.synchronize_stream(stream).gone()) return 0;
  const std::lock_guard lock(pool.lock);
  return pool.serial == target.serial ? pool.release_cached(most, std::min(mark, older_than)) : 0;
}

size_t CachingAllocator::release_cached(bool private_pools) {
  core_->retry_orphans();
  std::vector<Resolved> targets;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      // A pool that somebody holds keeps its memory: graphs replay in it.
      if (private_pools ? !key.first.is_default() && !private_pools_.contains(key.first)
                        : key.first.is_default()) {
        targets.push_back({pool, pool->serial});
      }
    }
  }
  size_t released = 0;
  for (const Resolved& target : targets) {
    released += release_cached(target, SIZE_MAX, UINT64_MAX);
  }
  if (private_pools) retire_empty_pools();
  return released;
}

size_t CachingAllocator::empty_cache() {
  if (in_forked_child()) return 0;
  process_pending();
  if (core_->settings.backend == Backend::Async) {
    core_->retry_orphans();
    for (const Resolved& target : pools()) {
      // What streams still use stays in the driver's pool.
      const StreamHandle stream = target.pool->stream();
      uint64_t capture = 0;
      if (core_->device.capture_id(stream, &capture).ok() && capture == 0)
        core_->device.synchronize_stream(stream);
    }
    size_t released = 0;
    core_->device.trim_async(&released);
    return released;
  }
  return release_cached(false) + release_cached(true);
}

void CachingAllocator::release_stream(StreamHandle stream) {
  if (in_forked_child()) return;
  core_->device.synchronize_stream(stream);
  std::vector<Resolved> targets;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      if (key.second == stream) targets.push_back({pool, pool->serial});
    }
  }
  for (const Resolved& target : targets) {
    {
      std::unique_lock lock(target.pool->lock);
      if (target.pool->serial == target.serial) target.pool->wait_pending(lock);
    }
    release_cached(target, SIZE_MAX, UINT64_MAX);  // nothing of a pool that somebody holds
  }
  process_pending();  // blocks of other streams that waited for this one
  retire_empty_pools();
}

bool CachingAllocator::call_out_of_memory_callback(size_t nbytes) {
  std::shared_ptr<const OutOfMemoryCallback> callback;
  {
    const std::lock_guard lock(callback_mutex_);
    callback = callback_;
  }
  return callback && (*callback)(nbytes);
}

}  // namespace vt::cuda
