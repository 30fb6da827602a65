#include "cuda/launch.h"

#include <cuda.h>

#include <cstdint>

#include "core/host_wait.h"
#include "cuda/error.h"
#include "cuda/sync.h"

namespace vt::cuda {
namespace {

using DriverLaunch = decltype(&cuLaunchKernel);

DriverLaunch driver_launch() {
  static const DriverLaunch function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuLaunchKernel", &address, CUDART_VERSION,
                                                cudaEnableDefault, &result),
               "finding the driver's launch function");
    check(result == cudaDriverEntryPointSuccess, "the CUDA driver has no cuLaunchKernel");
    return reinterpret_cast<DriverLaunch>(address);
  }();
  return function;
}

/// Handles of kernels this thread has launched, by kernel and device.
struct Known {
  const void* kernel;
  int device;
  cudaFunction_t function;
};
constexpr size_t kKnown = 1024;  // a power of two; a colliding kernel is looked up again

cudaFunction_t function_of(const void* kernel, int device) {
  thread_local Known known[kKnown] = {};
  const auto address = reinterpret_cast<uintptr_t>(kernel);
  Known& slot = known[((address >> 4) * 0x9E3779B97F4A7C15u >> 32 ^ static_cast<size_t>(device)) &
                      (kKnown - 1)];
  if (slot.kernel != kernel || slot.device != device) [[unlikely]] {
    cudaFunction_t function = nullptr;
    // Binds the device's context to the thread as well, which the driver's launch needs.
    check_cuda(cudaSetDevice(device), "binding the device");
    check_cuda(cudaGetFuncBySymbol(&function, kernel), "looking up a kernel");
    slot = {kernel, device, function};
  }
  return slot.function;
}

}  // namespace

void launch_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
                   Stream stream) {
  const CUresult result =
      driver_launch()(reinterpret_cast<CUfunction>(function_of(kernel, stream.device)), grid.x,
                      grid.y, grid.z, block.x, block.y, block.z,
                      static_cast<unsigned>(shared_bytes), stream.handle, arguments, nullptr);
  if (result != CUDA_SUCCESS) [[unlikely]] {
    // The runtime tells the same failure in its own words, and works where the thread's context
    // was changed behind our back.
    check_cuda(cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream.handle),
               "launching a kernel");
  }
  if (launch_blocking && !capturing()) [[unlikely]] {
    const HostWait waiting;
    check_cuda(cudaStreamSynchronize(stream.handle), "running the kernel just launched");
  }
}

}  // namespace vt::cuda
