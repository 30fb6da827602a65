// cuDNN: whether it can be had. The library is opened when first needed; where it is missing, our
// own kernels do its work. cudnn_graph.h describes computations to it. Its switches are among those
// of core/kernel_switches.h.
#pragma once

#include <cstdint>
#include <string>

namespace vt::cuda {

/// Whether the library could be opened; tries at the first call.
bool cudnn_available();
/// Why not; empty if it could.
const std::string& cudnn_problem();
/// As the library numbers itself: 91300 is 9.13.0. 0 where it is missing.
int64_t cudnn_version();
/// What the library said when it last had no plan for a computation on this thread.
const std::string& cudnn_refusal();
/// How many computations the library has run in this process.
int64_t cudnn_runs();

}  // namespace vt::cuda
