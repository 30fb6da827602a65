// CUDA C++ compiled at run time by NVRTC, and the kernels of what it made.
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <string>

#include "cuda/stream.h"

namespace vt::cuda {

/// Machine code of `source` for an architecture ("sm_90a"), and the log of warnings.
struct CompiledCode {
  std::string cubin;
  std::string log;
};
/// Throws with the compiler's log where the source is wrong. `name` is the file name in messages;
/// options are the compiler's ("-DN=4", "-use_fast_math").
CompiledCode nvrtc_compile(const std::string& source, const std::string& name,
                           const std::string& architecture, std::span<const std::string> options);
/// NVRTC's version, as "13.0". Throws where the library is missing.
std::string nvrtc_version();
/// The architecture of a device, as nvrtc_compile takes it.
std::string architecture_of(int device);

/// Machine code loaded for all devices. Must outlive the work of its kernels.
class Module {
 public:
  explicit Module(const std::string& cubin);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  /// A kernel by its name in the machine code (extern "C" ones keep theirs). Throws if there is
  /// none.
  cudaKernel_t kernel(const std::string& name) const;

 private:
  cudaLibrary_t library_ = nullptr;
};

/// `arguments` point at the kernel's parameters, as cudaLaunchKernel takes them.
void launch(cudaKernel_t kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
            Stream stream);

}  // namespace vt::cuda
