// How a pool's segments get memory and give it back. A plain segment is one driver allocation. An
// expandable one is a range of addresses, larger than the device's memory, in which pages are
// mapped as they are needed and unmapped wherever they are free: no hole between two live blocks
// can strand memory, as it goes back page by page and is mapped elsewhere.
#include <algorithm>

#include "cuda/allocator/stream_pool.h"

namespace vt::cuda {
namespace {

ApiStatus over_limit() { return {ApiCode::OutOfMemory, 0, "the memory limit is reached"}; }

size_t plain_segment_size(BlockKind kind, size_t size) {
  if (kind == BlockKind::Small) return kSmallSegment;
  return size < kLargeSegmentLimit ? kLargeSegment : align_up(size, kLargeRounding);
}

}  // namespace

ApiStatus StreamPool::grow(BlockKind kind, size_t size, const AllocationContext& context) {
  reserve_spares(4);
  return core_.expandable ? grow_expandable(kind, size, context) : grow_plain(kind, size, context);
}

ApiStatus StreamPool::grow_plain(BlockKind kind, size_t size, const AllocationContext& context) {
  segments_.reserve(segments_.size() + 1);
  auto segment = std::make_unique<Segment>();
  const size_t total = plain_segment_size(kind, size);
  if (!core_.claim(total)) return over_limit();
  uintptr_t address = 0;
  const ApiStatus status = core_.device.allocate(total, &address);
  if (!status.ok()) {
    core_.unclaim(total);
    return status;
  }
  core_.device_allocs.fetch_add(1, std::memory_order_relaxed);
  core_.segments.add(kind, 1);
  core_.reserved_bytes.add(kind, static_cast<int64_t>(total));
  if (total > core_.settings.max_split_size) core_.oversize_segments.add(1);
  Block* block = new_block();
  *segment = {.pool = this,
              .kind = kind,
              .address = address,
              .size = total,
              .mapped = total,
              .first = block,
              .context = context};
  block->address = address;
  block->size = total;
  block->kind = kind;
  block->segment = segment.get();
  core_.history.record(TraceAction::SegmentAlloc, address, total, stream_, id_, context);
  segments_.push_back(std::move(segment));
  merge_free(block);
  return {};
}

size_t StreamPool::free_plain(Segment* segment) noexcept {
  Block* block = segment->first;
  if (!core_.device.free(segment->address).gone()) return 0;  // stays cached
  const size_t total = segment->size;
  core_.device_frees.fetch_add(1, std::memory_order_relaxed);
  core_.unclaim(total);
  core_.segments.subtract(segment->kind, 1);
  core_.reserved_bytes.subtract(segment->kind, static_cast<int64_t>(total));
  if (total > core_.settings.max_split_size) core_.oversize_segments.subtract(1);
  core_.history.record(TraceAction::SegmentFree, segment->address, total, stream_, id_,
                       std::move(segment->context));
  index_of(block).remove(block);
  recycle(block);
  erase_segment(segment);
  return total;
}

void StreamPool::erase_segment(Segment* segment) noexcept {
  std::erase_if(segments_, [&](const auto& owned) { return owned.get() == segment; });
}

ApiStatus StreamPool::reserve_segment(BlockKind kind, size_t size,
                                      const AllocationContext& context) {
  segments_.reserve(segments_.size() + 1);
  auto segment = std::make_unique<Segment>();
  const size_t page = core_.page_size(kind);
  const size_t least = align_up(size, page);
  size_t range = std::max(least, align_up(core_.total_memory + core_.total_memory / 8, page));
  uintptr_t address = 0;
  ApiStatus status;
  for (;; range = std::max(least, align_up(range / 4, page))) {
    status = core_.device.reserve_range(range, &address);
    if (status.code != ApiCode::OutOfMemory || range == least) break;
  }
  if (!status.ok()) return status;
  try {
    segment->pages.resize(range / page);
    // With room for any pattern of mapped and unmapped pages, unmapping never allocates.
    segment->unmapped.reserve(range / page / 2 + 1);
  } catch (...) {
    if (!core_.device.free_range(address, range).gone()) core_.add_orphan(address, range);
    throw;
  }
  Block* block = new_block();
  segment->pool = this;
  segment->kind = kind;
  segment->expandable = true;
  segment->address = address;
  segment->size = range;
  segment->first = block;
  segment->context = context;
  segment->page = page;
  segment->unmapped.push_back(block);
  block->address = address;
  block->size = range;
  block->kind = kind;
  block->state = BlockState::Unmapped;
  block->segment = segment.get();
  segments_.push_back(std::move(segment));
  return {};
}

ApiStatus StreamPool::grow_expandable(BlockKind kind, size_t size,
                                      const AllocationContext& context) {
  const auto free_bytes = [](const Block* block) {
    return block && block->state == BlockState::Free ? block->size : 0;
  };
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (const auto& segment : segments_) {
      if (segment->kind != kind || !segment->expandable) continue;
      // The lowest place with room: free memory before it and after it counts.
      for (Block* hole : segment->unmapped) {
        const size_t before = free_bytes(hole->prev);
        if (before + hole->size + free_bytes(hole->next) < size) continue;
        const size_t missing = align_up(size - std::min(before, size - 1), segment->page);
        return map_front(hole, std::min(missing, hole->size), context);
      }
    }
    if (attempt == 0) {
      const ApiStatus status = reserve_segment(kind, size, context);
      if (!status.ok()) return status;
    }
  }
  return {ApiCode::Failed, 0, "an expandable segment has no room"};
}

/// Maps the first `nbytes` of an Unmapped block, which become free; nothing on failure. A page that
/// cannot be unmapped again is stuck: mapped behind an Unmapped block, and used by the next try.
ApiStatus StreamPool::map_front(Block* hole, size_t nbytes, const AllocationContext& context) {
  Segment& segment = *hole->segment;
  DeviceApi& device = core_.device;
  const size_t first = (hole->address - segment.address) / segment.page;
  const size_t count = nbytes / segment.page;
  ApiStatus status;
  size_t done = 0;
  for (; done < count; ++done) {
    PhysicalHandle& handle = segment.pages[first + done];
    if (handle != 0) {
      --segment.stuck;
      continue;
    }
    if (!core_.claim(segment.page)) {
      status = over_limit();
      break;
    }
    status = device.create_physical(segment.page, &handle);
    if (!status.ok()) {
      handle = 0;
      core_.unclaim(segment.page);
      break;
    }
    status = device.map(hole->address + done * segment.page, segment.page, handle);
    if (!status.ok()) {
      if (!device.release_physical(handle).gone()) core_.add_orphan(handle);
      handle = 0;
      core_.unclaim(segment.page);
      break;
    }
  }
  if (status.ok()) status = device.set_access(hole->address, nbytes);
  if (!status.ok()) {
    segment.stuck += done;
    for (size_t page = first + done; page-- > first;) unmap_page(segment, page, true);
    return status;
  }
  core_.device_allocs.fetch_add(static_cast<int64_t>(count), std::memory_order_relaxed);
  core_.segments.add(segment.kind, static_cast<int64_t>(count));
  core_.reserved_bytes.add(segment.kind, static_cast<int64_t>(nbytes));
  segment.mapped += nbytes;
  core_.history.record(TraceAction::SegmentMap, hole->address, nbytes, stream_, id_, context);
  auto position = std::find(segment.unmapped.begin(), segment.unmapped.end(), hole);
  if (nbytes < hole->size) {
    *position = split(hole, nbytes);  // in the same state: Unmapped
  } else {
    segment.unmapped.erase(position);
  }
  merge_free(hole);
  return {};
}

bool StreamPool::unmap_page(Segment& segment, size_t page, bool stuck) noexcept {
  if (!core_.device.unmap(segment.address + page * segment.page, segment.page).gone()) return false;
  PhysicalHandle& handle = segment.pages[page];
  if (!core_.device.release_physical(handle).gone()) core_.add_orphan(handle);
  handle = 0;
  core_.unclaim(segment.page);
  if (stuck) --segment.stuck;
  return true;
}

void StreamPool::unmap_stuck(Segment& segment) noexcept {
  for (const Block* hole : segment.unmapped) {
    const size_t first = (hole->address - segment.address) / segment.page;
    for (size_t page = first; segment.stuck && page < first + hole->size / segment.page; ++page) {
      if (segment.pages[page] != 0) unmap_page(segment, page, true);
    }
  }
}

/// Unmaps whole pages of a Free block, at most about `most` bytes. What is left on both sides stays
/// free. The host has waited for the stream.
size_t StreamPool::unmap_pages(Block* block, size_t most) noexcept {
  Segment& segment = *block->segment;
  const uintptr_t begin =
      segment.address + align_up(block->address - segment.address, segment.page);
  const uintptr_t end = segment.address + align_down(block->end() - segment.address, segment.page);
  if (begin >= end || spare_count_ < 2) return 0;
  uintptr_t at = begin;
  while (at < end && at - begin < most) {
    if (!unmap_page(segment, (at - segment.address) / segment.page, false)) break;
    at += segment.page;
  }
  const size_t bytes = at - begin;
  if (bytes == 0) return 0;
  const auto count = static_cast<int64_t>(bytes / segment.page);
  core_.device_frees.fetch_add(count, std::memory_order_relaxed);
  core_.segments.subtract(segment.kind, count);
  core_.reserved_bytes.subtract(segment.kind, static_cast<int64_t>(bytes));
  segment.mapped -= bytes;
  core_.history.record(TraceAction::SegmentUnmap, begin, bytes, stream_, id_, nullptr);

  FreeIndex& index = index_of(block);
  index.remove(block);
  if (block->address < begin) {
    Block* rest = split(block, begin - block->address);
    index.insert(block);
    block = rest;
  }
  if (block->end() > at) {
    index.insert(split(block, at - block->address));
  }
  block->state = BlockState::Unmapped;
  auto& holes = segment.unmapped;
  auto position = std::find_if(holes.begin(), holes.end(),
                               [&](const Block* hole) { return hole->address > block->address; });
  if (block->next && block->next->state == BlockState::Unmapped) {
    position = holes.erase(position);
    absorb_next(block);
  }
  if (block->prev && block->prev->state == BlockState::Unmapped) {
    absorb_next(block->prev);  // it is in the list already
  } else {
    holes.insert(position, block);
  }
  return bytes;
}

uint64_t StreamPool::mark_cached() noexcept {
  for (const auto& segment : segments_) {
    if (segment->stuck) unmap_stuck(*segment);
  }
  if (cached_bytes() == 0) {
    drop_empty_ranges();
    return 0;
  }
  uint64_t capture = 0;
  if (!core_.device.capture_id(stream_, &capture).ok() || capture != 0) return 0;
  flush_quick();
  return clock_ + 1;
}

size_t StreamPool::release_cached(size_t most, uint64_t older_than) noexcept {
  std::vector<Block*> candidates;
  try {
    reserve_spares(2);
    for (const FreeIndex& index : index_) {
      index.for_each([&](const Block& found) {
        auto* block = const_cast<Block*>(&found);
        if (block->freed_at >= older_than) return;
        const Segment& segment = *block->segment;
        const bool whole = !segment.expandable && !block->is_split();
        const size_t skip = segment.expandable
                                ? align_up(block->address - segment.address, segment.page) +
                                      segment.address - block->address
                                : 0;
        if (whole || (segment.expandable && block->size >= skip + segment.page)) {
          candidates.push_back(block);
        }
      });
    }
  } catch (const std::bad_alloc&) {
    return 0;
  }
  if (candidates.empty()) {
    drop_empty_ranges();
    return 0;
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const Block* a, const Block* b) { return a->freed_at < b->freed_at; });
  size_t released = 0;
  for (Block* block : candidates) {
    if (released >= most) break;
    try {
      reserve_spares(2);
    } catch (const std::bad_alloc&) {
      break;
    }
    released += block->segment->expandable ? unmap_pages(block, most - released)
                                           : free_plain(block->segment);
  }
  drop_empty_ranges();
  return released;
}

/// Gives back the address ranges of segments with no memory left, in pools out of use: the default
/// pool will want its range again.
void StreamPool::drop_empty_ranges() noexcept {
  if (id_.is_default() && serial != 0) return;
  for (size_t i = segments_.size(); i-- > 0;) {
    Segment* segment = segments_[i].get();
    if (!segment->expandable || segment->mapped != 0 || segment->stuck != 0) continue;
    if (!core_.device.free_range(segment->address, segment->size).gone()) {
      core_.add_orphan(segment->address, segment->size);
    }
    recycle(segment->first);
    erase_segment(segment);
  }
}

}  // namespace vt::cuda
