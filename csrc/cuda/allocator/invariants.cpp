// Consistency checks for the tests: every rule the data structures rely on.
#include <algorithm>
#include <mutex>
#include <set>

#include "core/error.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {
namespace {

std::string at(const Block* block) { return str(" (block at ", block->address, ")"); }

}  // namespace

std::string StreamPool::check_invariants() const {
  size_t free_bytes = 0, quick_bytes = 0, free_count = 0;
  int64_t live = 0;
  std::set<const Block*> indexed, quick;
  for (const FreeIndex& index : index_) {
    std::string wrong;
    index.for_each([&](const Block& block) {
      if (block.state != BlockState::Free)
        wrong = str("a block in the index is not free", at(&block));
      if (&index != &index_[static_cast<int>(block.kind)]) {
        wrong = str("a block is in the index of the other kind", at(&block));
      }
      indexed.insert(&block);
    });
    if (!wrong.empty()) return wrong;
  }
  for (size_t i = 0; i <= kQuickLimit / kBlockAlignment; ++i) {
    for (const Block* block = quick_[i]; block; block = block->list_next) {
      if (block->state != BlockState::Quick || block->size != i * kBlockAlignment) {
        return str("a block is in the wrong quick list", at(block));
      }
      quick.insert(block);
    }
  }
  for (const auto& segment : segments_) {
    uintptr_t address = segment->address;
    size_t mapped = 0, stuck = 0;
    std::vector<const Block*> holes;
    const Block* prev = nullptr;
    for (const Block* block = segment->first; block; prev = block, block = block->next) {
      if (block->address != address) return str("blocks do not tile their segment", at(block));
      if (block->prev != prev) return str("a back link is wrong", at(block));
      if (block->segment != segment.get() || block->pool != this || block->kind != segment->kind) {
        return str("a block has the wrong owner", at(block));
      }
      if (block->size == 0 || block->size % kBlockAlignment != 0) {
        return str("a block's size is ", block->size, at(block));
      }
      address += block->size;
      const bool free = block->state == BlockState::Free;
      if (free && prev && prev->state == BlockState::Free) {
        return str("two free neighbours are not merged", at(block));
      }
      if (block->state != BlockState::Unmapped) mapped += block->size;
      switch (block->state) {
        case BlockState::Spare:
          return str("a spare block is in a segment", at(block));
        case BlockState::Unmapped:
          if (prev && prev->state == BlockState::Unmapped) {
            return str("two unmapped neighbours are not merged", at(block));
          }
          holes.push_back(block);
          break;
        case BlockState::Free:
          free_bytes += block->size;
          ++free_count;
          if (!indexed.contains(block)) return str("a free block is not in the index", at(block));
          break;
        case BlockState::Quick:
          quick_bytes += block->size;
          if (!quick.contains(block)) return str("a quick block is in no quick list", at(block));
          break;
        case BlockState::Pending:
          if (block->outstanding == 0) return str("a pending block waits for nothing", at(block));
          [[fallthrough]];
        case BlockState::Allocated:
          ++live;
          if (block->requested > block->size) return str("a block is too small", at(block));
          break;
      }
    }
    if (address != segment->address + segment->size) return "blocks do not fill their segment";
    if (mapped != segment->mapped) return "a segment's mapped bytes are wrong";
    if (!segment->expandable) continue;
    if (!std::equal(holes.begin(), holes.end(), segment->unmapped.begin(),
                    segment->unmapped.end())) {
      return "a segment's list of holes is wrong";
    }
    size_t backed = 0;
    for (const PhysicalHandle handle : segment->pages) backed += handle != 0 ? segment->page : 0;
    for (const Block* hole : holes) {
      const size_t first = (hole->address - segment->address) / segment->page;
      if ((hole->address - segment->address) % segment->page || hole->size % segment->page) {
        return str("a hole is not made of whole pages", at(hole));
      }
      for (size_t p = first; p < first + hole->size / segment->page; ++p) {
        stuck += segment->pages[p] != 0;
      }
    }
    if (stuck != segment->stuck) return "a segment's count of stuck pages is wrong";
    if (backed != mapped + stuck * segment->page) return "mapped blocks and pages differ";
  }
  if (free_bytes != index_[0].bytes() + index_[1].bytes()) return "the index's bytes are wrong";
  if (free_count != index_[0].count() + index_[1].count()) return "the index's count is wrong";
  if (quick_bytes != quick_bytes_) return "the quick lists' bytes are wrong";
  if (core_.settings.backend == Backend::Native && live != live_blocks) {
    return str("live blocks: ", live, " counted, ", live_blocks, " noted");
  }
  return {};
}

std::string CachingAllocator::check_invariants() {
  size_t reserved = 0;
  int64_t allocated = 0, pending = 0;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      const std::lock_guard pool_lock(pool->lock);
      if (pool->serial == 0) return "a retired pool is still known";
      if (pool->id() != key.first || pool->stream() != key.second) return "a pool is misfiled";
      std::string wrong = pool->check_invariants();
      if (!wrong.empty()) return wrong;
      for (const auto& segment : pool->segments()) {
        reserved += segment->mapped + segment->stuck * segment->page;
        for (const Block* block = segment->first; block; block = block->next) {
          if (block->state == BlockState::Allocated) allocated += static_cast<int64_t>(block->size);
          if (block->state == BlockState::Pending) pending += static_cast<int64_t>(block->size);
        }
      }
    }
    for (const StreamPool* pool : retired_) {
      if (pool->serial != 0 || pool->has_memory() || pool->live_blocks != 0) {
        return "a retired pool holds memory";
      }
    }
  }
  if (core_->settings.backend == Backend::Async) return {};
  if (reserved != core_->claimed()) {
    return str("reserved bytes: ", reserved, " counted, ", core_->claimed(), " noted");
  }
  if (allocated != core_->gauges.allocated_bytes()) {
    return str("allocated bytes: ", allocated, " counted, ", core_->gauges.allocated_bytes(),
               " noted");
  }
  if (pending != core_->gauges.pending_bytes()) {
    return str("pending bytes: ", pending, " counted, ", core_->gauges.pending_bytes(), " noted");
  }
  const MemoryStats now = stats();
  for (const StatByKind* stat : {&now.allocation, &now.allocated_bytes, &now.requested_bytes,
                                 &now.segment, &now.reserved_bytes}) {
    for (const Stat* one : {&stat->all, &stat->small_pool, &stat->large_pool}) {
      if (one->current < 0 || one->peak < one->current) return "a statistic is out of range";
    }
    if (stat->all.current != stat->small_pool.current + stat->large_pool.current) {
      return "a statistic's kinds do not add up";
    }
  }
  return {};
}

}  // namespace vt::cuda
