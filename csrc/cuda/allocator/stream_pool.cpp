#include "cuda/allocator/stream_pool.h"

#include <algorithm>

namespace vt::cuda {
namespace {

constexpr int kSlab = 64;

}  // namespace

void StreamPool::reserve_spares(int count) {
  while (spare_count_ < count) {
    slabs_.reserve(slabs_.size() + 1);
    auto slab = std::make_unique<Block[]>(kSlab);
    for (int i = 0; i < kSlab; ++i) {
      slab[i].pool = this;
      slab[i].list_next = spares_;
      spares_ = &slab[i];
    }
    spare_count_ += kSlab;
    slabs_.push_back(std::move(slab));
  }
}

Block* StreamPool::new_block() noexcept {
  Block* block = spares_;  // reserve_spares saw to it
  spares_ = block->list_next;
  --spare_count_;
  block->list_next = nullptr;
  return block;
}

void StreamPool::recycle(Block* block) noexcept {
  block->state = BlockState::Spare;
  block->prev = block->next = block->list_prev = nullptr;
  block->segment = nullptr;
  block->size = block->requested = 0;
  block->list_next = spares_;
  spares_ = block;
  ++spare_count_;
}

Block* StreamPool::split(Block* block, size_t size) noexcept {
  Block* rest = new_block();
  rest->address = block->address + size;
  rest->size = block->size - size;
  rest->kind = block->kind;
  rest->state = block->state;
  rest->segment = block->segment;
  rest->freed_at = block->freed_at;
  rest->prev = block;
  rest->next = block->next;
  if (rest->next) rest->next->prev = rest;
  block->next = rest;
  block->size = size;
  return rest;
}

void StreamPool::absorb_next(Block* block) noexcept {
  Block* next = block->next;
  block->size += next->size;
  block->next = next->next;
  if (block->next) block->next->prev = block;
  recycle(next);
}

Block* StreamPool::take_from_index(BlockKind kind, size_t size, size_t requested) {
  FreeIndex& index = index_[static_cast<int>(kind)];
  size_t largest = SIZE_MAX;
  const size_t max_split = core_.settings.max_split_size;
  const bool bounded = kind == BlockKind::Large && !core_.expandable && max_split != SIZE_MAX;
  if (bounded) largest = size <= max_split ? max_split : size + kLargeSegment;
  Block* block = index.find(size, largest);
  if (!block) return nullptr;
  const size_t least = kind == BlockKind::Small ? kBlockAlignment : kLargeRemainder;
  const bool cut = block->size - size >= least && !(bounded && block->size > max_split);
  if (cut) reserve_spares(1);
  index.remove(block);
  if (cut) index.insert(split(block, size));
  hand_out(block, requested);
  return block;
}

void StreamPool::merge_free(Block* block) noexcept {
  block->state = BlockState::Free;
  block->freed_at = ++clock_;
  FreeIndex& index = index_of(block);
  if (block->next && block->next->state == BlockState::Free) {
    index.remove(block->next);
    absorb_next(block);
  }
  if (block->prev && block->prev->state == BlockState::Free) {
    Block* prev = block->prev;
    index.remove(prev);
    prev->freed_at = block->freed_at;
    absorb_next(prev);
    block = prev;
  }
  index.insert(block);
}

void StreamPool::flush_quick() noexcept {
  if (quick_bytes_ == 0) return;
  for (Block*& head : quick_) {
    while (Block* block = head) {
      head = block->list_next;
      block->list_next = nullptr;
      merge_free(block);
    }
  }
  quick_bytes_ = 0;
}

void StreamPool::put_pending(Block* block) noexcept {
  try {
    pending.add(block);
  } catch (...) {
    // No memory to note it: wait for the other streams here and now.
    for (const StreamUse& use : block->uses) use.device->synchronize_stream(use.stream);
    block->uses.clear();
    put(block);
    return;
  }
  block->state = BlockState::Pending;
  PoolCounters::PerKind& counter = counters.kinds[static_cast<int>(block->kind)];
  ++counter.frees;
  counter.freed_bytes += static_cast<int64_t>(block->size);
  counter.requested_freed += static_cast<int64_t>(block->requested);
  core_.gauges.on_pending(block->kind, block->size);
  core_.gauges.on_free(block->kind, block->size, block->requested);
}

ApiStatus StreamPool::process_pending() noexcept {
  if (pending.empty()) return {};
  std::vector<Block*> done;
  ApiStatus status;
  try {
    done.reserve(pending.count());
    status = pending.process(&stream_, done);
  } catch (const std::bad_alloc&) {
    status = {ApiCode::Failed, 0, "out of host memory"};
  }
  for (Block* block : done) {
    core_.gauges.on_pending_done(block->kind, block->size);
    if (core_.history.on()) {
      core_.history.record(TraceAction::FreeCompleted, block->address, block->size, stream_, id_,
                           block->context);
      block->context.reset();
    }
    block->uses.clear();
    if (block->segment) {
      become_free(block);
    } else {
      --live_blocks;
      recycle(block);
    }
  }
  return status;
}

void StreamPool::wait_pending(std::unique_lock<PoolLock>& lock) noexcept {
  try {
    std::vector<PendingFrees::Wait> waits = pending.begin_wait(&stream_);
    if (!waits.empty()) {
      lock.unlock();
      PendingFrees::wait(waits);
      lock.lock();
      pending.end_wait(waits);
    }
  } catch (const std::bad_alloc&) {
  }
  process_pending();
}

uint64_t StreamPool::average_free_clock() const {
  uint64_t sum = 0, count = 0;
  for (const FreeIndex& index : index_) {
    index.for_each([&](const Block& block) {
      sum += block.freed_at;
      ++count;
    });
  }
  return count ? sum / count + 1 : 0;
}

size_t StreamPool::largest_free() const {
  size_t largest = std::max(index_[0].largest(), index_[1].largest());
  for (size_t i = 0; i <= kQuickLimit / kBlockAlignment; ++i) {
    if (quick_[i]) largest = std::max(largest, i * kBlockAlignment);
  }
  return largest;
}

size_t StreamPool::mapped_bytes() const {
  size_t mapped = 0;
  for (const auto& segment : segments_) mapped += segment->mapped;
  return mapped;
}

Block* StreamPool::make_unsegmented(uintptr_t address, size_t size, size_t requested) {
  Block* block = new_block();
  block->address = address;
  block->size = size;
  block->kind = size <= kSmallLimit ? BlockKind::Small : BlockKind::Large;
  hand_out(block, requested);
  return block;
}

void StreamPool::drop_unsegmented(Block* block) noexcept {
  PoolCounters::PerKind& counter = counters.kinds[static_cast<int>(block->kind)];
  ++counter.frees;
  counter.freed_bytes += static_cast<int64_t>(block->size);
  counter.requested_freed += static_cast<int64_t>(block->requested);
  core_.gauges.on_free(block->kind, block->size, block->requested);
  --live_blocks;
  recycle(block);
}

void StreamPool::retire() noexcept {
  serial = 0;
  pending.destroy_events();
}

void StreamPool::reset(MempoolId id, StreamHandle stream, uint64_t new_serial) {
  id_ = id;
  stream_ = stream;
  counters = {};
  clock_ = 1;
  serial = new_serial;
}

}  // namespace vt::cuda
