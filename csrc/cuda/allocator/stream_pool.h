// The memory of one stream in one pool: segments, their free blocks, and the blocks that wait for
// other streams. Everything here needs the pool's lock, which the caller holds.
//
// A freed block may be handed out again at once, because work on one stream runs in order. Blocks
// that other streams used too wait for an event on each of them (pending_frees.h). Only what
// leaves the pool, memory given back to the driver, needs the host to wait for the stream.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/allocator/core.h"
#include "cuda/allocator/free_index.h"
#include "cuda/allocator/mempool.h"
#include "cuda/allocator/pending_frees.h"
#include "cuda/allocator/pool_lock.h"

namespace vt::cuda {

class StreamPool {
 public:
  StreamPool(AllocatorCore& core, MempoolId id, StreamHandle stream, uint64_t serial)
      : serial(serial), pending(core.device), core_(core), id_(id), stream_(stream) {}
  StreamPool(const StreamPool&) = delete;
  StreamPool& operator=(const StreamPool&) = delete;

  PoolLock lock;
  /// Changes when the object is taken out of use or into use again; 0: out of use.
  uint64_t serial;
  PoolCounters counters;
  PendingFrees pending;
  int64_t live_blocks = 0;  // Allocated or Pending

  MempoolId id() const { return id_; }
  StreamHandle stream() const { return stream_; }
  AllocatorCore& core() const { return core_; }

  /// A block for the request from what is free here; null if there is none.
  Block* take(BlockKind kind, size_t size, size_t requested) {
    if (size <= kQuickLimit) {
      Block*& head = quick_[size / kBlockAlignment];
      if (Block* block = head) {
        head = block->list_next;
        block->list_next = nullptr;
        quick_bytes_ -= size;
        hand_out(block, requested);
        return block;
      }
    }
    return take_from_index(kind, size, requested);
  }

  /// Takes back a block that nothing waits for.
  void put(Block* block) noexcept {
    const int k = static_cast<int>(block->kind);
    PoolCounters::PerKind& counter = counters.kinds[k];
    ++counter.frees;
    counter.freed_bytes += static_cast<int64_t>(block->size);
    counter.requested_freed += static_cast<int64_t>(block->requested);
    core_.gauges.on_free(block->kind, block->size, block->requested);
    become_free(block);
  }
  /// The same for a block on which work of other streams waits: true if it is free at once.
  void put_pending(Block* block) noexcept;

  /// Frees the pending blocks whose other streams are done.
  ApiStatus process_pending() noexcept;
  /// Waits for the other streams first, with the lock, which `lock` holds, let go of meanwhile.
  void wait_pending(std::unique_lock<PoolLock>& lock) noexcept;
  /// Merges the blocks of the quick lists with their neighbours.
  void flush_quick() noexcept;
  /// Gets memory from the driver so that `take` finds a block of `size`.
  ApiStatus grow(BlockKind kind, size_t size, const AllocationContext& context);
  // What is given back to the driver may still be in use by the stream, so the host waits for it
  // first, with the lock let go of: what is freed meanwhile stays.
  //   mark = mark_cached(); <unlock, wait for the stream, lock> release_cached(most, mark);
  /// The time up to which free memory could be given back; 0 where there is none, or while the
  /// stream is being captured.
  uint64_t mark_cached() noexcept;
  /// Gives free memory back to the driver, at most about `most` bytes, that of blocks freed before
  /// `older_than` only. Returns the bytes released.
  size_t release_cached(size_t most, uint64_t older_than) noexcept;
  /// Blocks freed before this are older than the average free block.
  uint64_t average_free_clock() const;
  bool has_memory() const { return !segments_.empty(); }
  /// Takes the object out of use; it must hold no memory. For reuse with `reset`.
  void retire() noexcept;
  void reset(MempoolId id, StreamHandle stream, uint64_t serial);

  size_t cached_bytes() const { return index_[0].bytes() + index_[1].bytes() + quick_bytes_; }
  size_t largest_free() const;
  size_t mapped_bytes() const;
  const std::vector<std::unique_ptr<Segment>>& segments() const { return segments_; }
  /// What is inconsistent, for tests; empty when all is well.
  std::string check_invariants() const;

  /// A block that belongs to no segment (backend:async), counted as the others are.
  Block* make_unsegmented(uintptr_t address, size_t size, size_t requested);
  void drop_unsegmented(Block* block) noexcept;
  /// Makes sure that `make_unsegmented` and splitting find spare blocks. Throws bad_alloc.
  void reserve_spares(int count);

 private:
  static constexpr size_t kQuickLimit = size_t{32} << 10;

  void hand_out(Block* block, size_t requested) {
    block->state = BlockState::Allocated;
    block->requested = requested;
    ++live_blocks;
    PoolCounters::PerKind& counter = counters.kinds[static_cast<int>(block->kind)];
    ++counter.allocations;
    counter.allocated_bytes += static_cast<int64_t>(block->size);
    counter.requested_allocated += static_cast<int64_t>(requested);
    if (block->is_split()) {
      ++counter.split_frees;
      counter.split_freed_bytes += static_cast<int64_t>(block->size);
    }
    core_.gauges.on_allocate(block->kind, block->size, requested);
  }
  void become_free(Block* block) noexcept {
    --live_blocks;
    if (block->size <= kQuickLimit && block->is_split()) {
      block->state = BlockState::Quick;
      Block*& head = quick_[block->size / kBlockAlignment];
      block->list_next = head;
      head = block;
      quick_bytes_ += block->size;
      return;
    }
    merge_free(block);
  }
  Block* take_from_index(BlockKind kind, size_t size, size_t requested);
  /// Marks the block Free, merges it with free neighbours and puts it into the index.
  void merge_free(Block* block) noexcept;
  /// Cuts `block` at `size`; returns the rest, in no list and in the state of `block`.
  Block* split(Block* block, size_t size) noexcept;
  /// Makes `block` cover `block->next` too, which becomes spare.
  void absorb_next(Block* block) noexcept;
  FreeIndex& index_of(const Block* block) { return index_[static_cast<int>(block->kind)]; }
  Block* new_block() noexcept;
  void recycle(Block* block) noexcept;

  // segment.cpp
  ApiStatus grow_plain(BlockKind kind, size_t size, const AllocationContext& context);
  ApiStatus grow_expandable(BlockKind kind, size_t size, const AllocationContext& context);
  ApiStatus map_front(Block* unmapped, size_t nbytes, const AllocationContext& context);
  ApiStatus reserve_segment(BlockKind kind, size_t size, const AllocationContext& context);
  size_t unmap_pages(Block* block, size_t most) noexcept;
  bool unmap_page(Segment& segment, size_t page, bool stuck) noexcept;
  void unmap_stuck(Segment& segment) noexcept;
  size_t free_plain(Segment* segment) noexcept;
  void drop_empty_ranges() noexcept;
  void erase_segment(Segment* segment) noexcept;

  AllocatorCore& core_;
  MempoolId id_;
  StreamHandle stream_;
  Block* quick_[kQuickLimit / kBlockAlignment + 1] = {};
  size_t quick_bytes_ = 0;
  uint64_t clock_ = 1;  // ticks as blocks return to the index
  FreeIndex index_[kKinds];
  std::vector<std::unique_ptr<Segment>> segments_;
  Block* spares_ = nullptr;
  int spare_count_ = 0;
  std::vector<std::unique_ptr<Block[]>> slabs_;
};

}  // namespace vt::cuda
