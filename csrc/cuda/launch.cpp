#include "cuda/launch.h"

#include <cuda.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cuda/error.h"
#include "cuda/repeated_launch.h"
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

/// A kernel this thread has launched on a device.
struct Known {
  const void* kernel = nullptr;
  int device = 0;
  cudaFunction_t function = nullptr;
  RepeatedLaunch repeated;
};

/// The calling thread's kernels, a hash table whose places are shared by few: where all of a
/// kernel's are taken, one is looked up anew.
class KnownKernels {
 public:
  constexpr KnownKernels() = default;
  ~KnownKernels() {
    // Not for the main thread, a forked child's neither: what it has ends with the process, of
    // which the driver may be gone already, or with the parent's.
    if (syscall(SYS_gettid) == getpid()) return;
    RepeatedLaunch::reset_thread();
  }
  Known& find(const void* kernel, int device) {
    const auto address = reinterpret_cast<uintptr_t>(kernel);
    const size_t home =
        ((address >> 4) * 0x9E3779B97F4A7C15u >> 32 ^ static_cast<size_t>(device)) & (kPlaces - 1);
    for (size_t i = 0; i < kShared; ++i) {
      Known& known = all_[home ^ i];
      if (known.kernel == kernel && known.device == device) [[likely]]
        return known;
    }
    return add(kernel, device, home);
  }

 private:
  static constexpr size_t kPlaces = 1024;  // a power of two
  static constexpr size_t kShared = 4;     // and this, which divides it

  Known& add(const void* kernel, int device, size_t home) {
    cudaFunction_t function = nullptr;
    // Binds the device's context to the thread as well, which the driver's launch needs.
    check_cuda(cudaSetDevice(device), "binding the device");
    check_cuda(cudaGetFuncBySymbol(&function, kernel), "looking up a kernel");
    size_t place = home;
    for (size_t i = kShared; i-- > 0;) {
      if (!all_[home ^ i].kernel) place = home ^ i;
    }
    Known& known = all_[place];
    known.kernel = kernel;
    known.device = device;
    known.function = function;
    known.repeated.begin();
    return known;
  }

  Known all_[kPlaces];
};

thread_local constinit KnownKernels known_kernels;

}  // namespace

void launch_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
                   Stream stream) {
  Known& known = known_kernels.find(kernel, stream.device);
  const KernelLaunch launch{reinterpret_cast<CUfunction>(known.function), grid, block,
                            static_cast<unsigned>(shared_bytes), arguments};
  CUresult result = CUDA_SUCCESS;
  if (!known.repeated.launch(launch, stream)) {
    result = driver_launch()(launch.function, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                             launch.shared_bytes, stream.handle, arguments, nullptr);
  }
  if (result != CUDA_SUCCESS) [[unlikely]] {
    // The runtime tells the same failure in its own words, and works where the thread's context
    // was changed behind our back.
    check_cuda(cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream.handle),
               "launching a kernel");
  }
  wait_if_blocking(stream.handle);
}

void launch_clusters(const void* kernel, dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes,
                     void** arguments, Stream stream) {
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.handle;
  config.attrs = &clusters;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), "launching a kernel in clusters");
  wait_if_blocking(stream.handle);
}

}  // namespace vt::cuda
