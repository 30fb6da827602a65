// A per-thread free list for the small fixed-size objects behind every tensor and node. Making
// and dropping a tensor is the commonest thing the runtime does; this keeps it off the heap.
#pragma once

#include <cstddef>

namespace vt {

void* block_cache_allocate(size_t size);
void block_cache_release(void* pointer, size_t size) noexcept;

}  // namespace vt
