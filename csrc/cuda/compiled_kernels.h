// Kernels compiled at run time, each once: in a process, and on a machine by a folder of machine
// code, $XDG_CACHE_HOME/vibetensor/kernels (or ~/.cache/…), unless users besides this one can write
// there.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <string_view>

namespace vt::cuda {

/// The kernel `name` of a source, for the architecture of a device. Kernels are never unloaded:
/// graphs may outlive everything else. Any thread may ask; one source is compiled once. Throws with
/// the compiler's log where the source is wrong, and where NVRTC is missing.
cudaKernel_t compiled_kernel(const std::string& source, const std::string& name, int device);

/// Why nothing can be compiled: NVRTC is missing. Empty if it is there.
std::string compiler_problem();

}  // namespace vt::cuda
