#include "cuda/allocator/snapshot.h"

#include "cuda/allocator/stream_pool.h"

namespace vt::cuda {

std::string_view block_state_name(BlockState state) {
  switch (state) {
    case BlockState::Allocated:
      return "active_allocated";
    case BlockState::Pending:
      return "active_pending_free";
    default:
      return "inactive";
  }
}

void append_segments(const StreamPool& pool, std::vector<SegmentInfo>& out) {
  for (const auto& segment : pool.segments()) {
    SegmentInfo* info = nullptr;
    for (const Block* block = segment->first; block; block = block->next) {
      if (block->state == BlockState::Unmapped) {
        info = nullptr;
        continue;
      }
      if (!info) {
        info = &out.emplace_back();
        info->device = pool.core().device_index;
        info->address = block->address;
        info->stream = pool.stream();
        info->is_large = segment->kind == BlockKind::Large;
        info->is_expandable = segment->expandable;
        info->pool = pool.id();
        info->context = segment->context;
      }
      info->total_size += block->size;
      const bool allocated = block->state == BlockState::Allocated;
      const bool active = allocated || block->state == BlockState::Pending;
      if (allocated) info->allocated_size += block->size;
      if (active) info->active_size += block->size;
      if (active) info->requested_size += block->requested;
      info->blocks.push_back({block->address, block->size, active ? block->requested : 0,
                              block->state, block->context});
    }
  }
}

}  // namespace vt::cuda
