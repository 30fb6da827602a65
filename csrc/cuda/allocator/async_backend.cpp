// backend:async: the driver's stream-ordered pool does the caching; limits, counters, history and
// record_stream work as with the native allocator.
#include <algorithm>
#include <mutex>

#include "core/error.h"
#include "core/host_wait.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {

Allocation CachingAllocator::allocate_async(size_t nbytes, size_t size, StreamHandle stream,
                                            AllocationContext context) {
  enum Rung { First, AfterSynchronize, AfterCallback };
  uintptr_t address = 0;
  StreamPool& pool = *route(stream).pool;  // of the default pool, never taken out of use
  {
    const std::lock_guard lock(pool.lock);
    pool.reserve_spares(1);
  }
  for (int rung = First;; ++rung) {
    ApiStatus status{ApiCode::OutOfMemory, 0, "the memory limit is reached"};
    if (core_->claim(size)) {
      status = core_->device.allocate_async(size, stream, &address);
      if (status.ok()) break;
      core_->unclaim(size);
    }
    if (status.code != ApiCode::OutOfMemory) {
      fail("cuda:", core_->device_index, ": cannot allocate ", nbytes,
           " bytes: ", status.code == ApiCode::Dead ? "the CUDA context is gone" : status.message);
    }
    if (rung == First) {
      core_->alloc_retries.fetch_add(1, std::memory_order_relaxed);
      core_->sync_all_streams.fetch_add(1, std::memory_order_relaxed);
      {
        const HostWait waiting;
        core_->device.synchronize_device();
      }
      core_->retry_orphans();
    } else if (rung == AfterCallback || !call_out_of_memory_callback(nbytes)) {
      throw_out_of_memory(nbytes, status, stream, std::move(context));
    }
  }
  core_->device_allocs.fetch_add(1, std::memory_order_relaxed);
  const BlockKind kind = size <= kSmallLimit ? BlockKind::Small : BlockKind::Large;
  core_->reserved_bytes.add(kind, static_cast<int64_t>(size));
  std::unique_lock lock(pool.lock);
  try {
    pool.reserve_spares(1);
  } catch (...) {
    lock.unlock();
    core_->device.free_async(address, stream);
    core_->reserved_bytes.subtract(kind, static_cast<int64_t>(size));
    core_->unclaim(size);
    throw;
  }
  Block* block = pool.make_unsegmented(address, size, nbytes);
  if (core_->history.on()) {
    block->context = context;
    core_->history.record(TraceAction::Alloc, address, size, stream, pool.id(), std::move(context));
  }
  return hand_over(block, nbytes);
}

void CachingAllocator::release_async(StreamPool* pool, Block* block) noexcept {
  AllocatorCore& core = pool->core();
  DeviceApi& device = core.device;
  const StreamHandle own = pool->stream();
  // The free must come after what the other streams do with the memory. Those that cannot be
  // ordered before it, as one of the two is captured or a call fails, stay in `uses`.
  std::erase_if(block->uses,
                [&](const StreamUse& use) { return pool->pending.order_after(own, use); });
  if (!block->uses.empty() || !device.free_async(block->address, own).gone()) {
    core.add_orphan(block->address, own, std::move(block->uses));
  }
  block->uses.clear();
  core.device_frees.fetch_add(1, std::memory_order_relaxed);
  core.reserved_bytes.subtract(block->kind, static_cast<int64_t>(block->size));
  core.unclaim(block->size);
  pool->drop_unsegmented(block);
}

}  // namespace vt::cuda
