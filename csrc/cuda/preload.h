// What the first steps of a process wait for, made ready by threads while its models are built and
// its data is read: cuBLASLt, which takes 0.1 to 0.2 s until its first product runs, and the code
// of kernels that most training steps launch, 1 to 4 ms a file.
#pragma once

namespace vt::cuda {

/// Starts that for a device, which need not have been used; once, and not with VT_CUDA_PRELOAD=0.
/// What goes wrong is left to those who need the library or the kernels, and say so.
void preload(int device);

/// Waits for what was started.
void wait_for_preloads();

/// The same, and nothing is started from now on; to be called before the process ends.
void finish_preloads();

/// Marks the kernels of a file, by one of them, as to be loaded. For objects at namespace scope.
struct EarlyKernels {
  explicit EarlyKernels(const void* kernel);
};

}  // namespace vt::cuda

/// In a file of kernels, at namespace scope: its code is what preload() loads.
#define VT_LOAD_EARLY                                                                 \
  namespace {                                                                         \
  __global__ void loaded_early() {}                                                   \
  const ::vt::cuda::EarlyKernels early(reinterpret_cast<const void*>(&loaded_early)); \
  }
