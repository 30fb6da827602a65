// cuDNN: its switches, and whether it can be had. The library is opened when first needed; where it
// is missing, our own kernels do its work. cudnn_graph.h describes computations to it.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace vt::cuda {

/// The switches of torch.backends.cudnn, and those of torch.backends.cuda that concern it. Read at
/// every call, set at any time.
struct CudnnSettings {
  std::atomic<bool> enabled{true};
  std::atomic<bool> benchmark{false};        // convolutions measure their plans on first use
  std::atomic<bool> deterministic{false};    // convolutions use deterministic plans only
  std::atomic<bool> allow_tf32{true};        // float32 convolutions may round inputs to TF32
  std::atomic<bool> attention{true};         // fused attention, where it applies and is faster
  std::atomic<bool> small_attention{false};  // also where it is not faster than our own
  /// use_deterministic_algorithms: concerns convolutions and attention alike.
  std::atomic<bool> deterministic_algorithms{false};
};
CudnnSettings& cudnn_settings();

/// Whether the library could be opened; tries at the first call.
bool cudnn_available();
/// Why not; empty if it could.
const std::string& cudnn_problem();
/// As the library numbers itself: 91300 is 9.13.0. 0 where it is missing.
int64_t cudnn_version();
/// Where it was found.
std::string cudnn_path();
/// What the library said when it last had no plan for a computation on this thread.
const std::string& cudnn_refusal();
/// How many computations the library has run in this process.
int64_t cudnn_runs();

}  // namespace vt::cuda
