// Device memory from the driver's stream-ordered pool (cudaMallocAsync): the backend
// VT_CUDA_ALLOC=backend:async chooses, and page-locked host memory.
#pragma once

#include "core/allocator.h"

namespace vt::cuda {

/// Registers the allocator of CUDA storages.
void install_allocator();
/// Gives memory that no tensor uses back to the driver.
void empty_cache();
Allocation allocate_pinned(size_t nbytes);
bool is_pinned(const void* pointer);

}  // namespace vt::cuda
