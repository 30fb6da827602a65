// Issues kernels. The driver's handle of a kernel is looked up once per thread, so that a launch is
// one driver call: the runtime's own way looks it up and checks its state every time. Kernels that
// come again and again cost less than that call (repeated_launch.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/stream.h"

namespace vt::cuda {

/// Launches `kernel` (its host stub) with the addresses of its arguments on a stream of the
/// current device. Throws what the driver refuses.
void launch_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
                   Stream stream);
/// The same for a kernel whose blocks are in clusters, whose extents divide the grid's.
void launch_clusters(const void* kernel, dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes,
                     void** arguments, Stream stream);

}  // namespace vt::cuda
