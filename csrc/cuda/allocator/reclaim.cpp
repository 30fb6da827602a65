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
  const std::lock_guard lock(pool.lock);
  *stale = pool.serial != target.serial;
  if (*stale) return nullptr;
  pool.process_pending(false);  // what fails here stays pending
  if (kind == BlockKind::Small) pool.flush_quick();
  Block* block = pool.take(kind, size, nbytes);
  if (!block) {
    collect_garbage(pool, size);
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

void CachingAllocator::collect_garbage(StreamPool& pool, size_t size) {
  const double threshold = core_->settings.garbage_collection_threshold;
  if (threshold <= 0) return;
  const size_t cap = std::min(core_->limit.load(), core_->total_memory);
  const auto aim = static_cast<size_t>(threshold * static_cast<double>(cap));
  const size_t wanted = core_->claimed() + size;
  if (wanted <= aim) return;
  pool.release_cached(wanted - aim, pool.average_free_clock());
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
  for (StreamPool* pool : pools()) {
    const std::lock_guard lock(pool->lock);
    if (pool->serial != 0) pool->process_pending(true);
  }
}

size_t CachingAllocator::release_cached(bool private_pools) {
  std::vector<StreamPool*> targets;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      // A pool that somebody holds keeps its memory: graphs replay in it.
      if (private_pools ? !key.first.is_default() && !private_pools_.contains(key.first)
                        : key.first.is_default()) {
        targets.push_back(pool);
      }
    }
  }
  size_t released = 0;
  for (StreamPool* pool : targets) {
    const std::lock_guard lock(pool->lock);
    if (pool->serial != 0) released += pool->release_cached();
  }
  if (private_pools) retire_empty_pools();
  return released;
}

size_t CachingAllocator::empty_cache() {
  if (in_forked_child()) return 0;
  for (StreamPool* pool : pools()) {
    const std::lock_guard lock(pool->lock);
    if (pool->serial != 0) pool->process_pending(false);
  }
  return release_cached(false) + release_cached(true);
}

void CachingAllocator::release_stream(StreamHandle stream) {
  if (in_forked_child()) return;
  core_->device.synchronize_stream(stream);
  std::vector<std::pair<StreamPool*, bool>> targets;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      if (key.second == stream) targets.emplace_back(pool, !private_pools_.contains(key.first));
    }
  }
  for (const auto& [pool, free_it] : targets) {
    const std::lock_guard lock(pool->lock);
    if (pool->serial == 0) continue;
    pool->process_pending(true);
    if (free_it) pool->release_cached();
  }
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
