// Launching a kernel: on the current stream of a device, with its arguments by value and the
// launch's error checked. Nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "cuda/error.h"
#include "cuda/launch.h"
#include "dispatch/kernels.h"

namespace vt::cuda {

using RegisterCuda = RegisterKernels<DeviceType::CUDA>;

constexpr int kWarp = 32;

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

/// The device a kernel runs on, made current, and its current stream.
class Launch {
 public:
  explicit Launch(Device device) : guard_(device.index), stream_(current_stream(device.index)) {}

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  Args&&... args) const {
    launch(kernel, grid, {}, block, shared_bytes, Params(std::forward<Args>(args))...);
  }
  /// In clusters of so many blocks.
  template <class... Params, class... Args>
  void in_clusters(void (*kernel)(Params...), dim3 grid, dim3 cluster, dim3 block,
                   size_t shared_bytes, Args&&... args) const {
    launch(kernel, grid, cluster, block, shared_bytes, Params(std::forward<Args>(args))...);
  }
  cudaStream_t stream() const { return stream_.handle; }
  int device() const { return stream_.device; }
  const DeviceProperties& properties() const { return cuda::properties(stream_.device); }
  /// Enough blocks to fill the device `waves` times, at most `blocks`: for grid-stride kernels.
  int64_t fill(int64_t blocks, int block_threads, int waves = 4) const {
    const int64_t per_sm = properties().max_threads_per_sm / block_threads;
    return std::max<int64_t>(
        1, std::min<int64_t>(blocks, per_sm * properties().multiprocessors * waves));
  }

 private:
  template <class... Params>
  void launch(void (*kernel)(Params...), dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes,
              Params... params) const {
    void* pointers[] = {static_cast<void*>(&params)..., nullptr};
    const auto* const stub = reinterpret_cast<const void*>(kernel);
    if (cluster.x * cluster.y * cluster.z > 1)
      launch_clusters(stub, grid, cluster, block, shared_bytes, pointers, stream_);
    else
      launch_kernel(stub, grid, block, shared_bytes, pointers, stream_);
  }

  DeviceGuard guard_;
  Stream stream_;
};

/// Lets `kernel` use `bytes` of shared memory, more than the 48 KiB every kernel may.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), int bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "reserving shared memory");
}

/// Scratch memory for the rest of a scope, stream-ordered: freed after the work issued so far.
class Scratch {
 public:
  Scratch(size_t nbytes, const Launch& launch)
      : allocation_(allocator_for(DeviceType::CUDA)
                        .allocate(nbytes, {DeviceType::CUDA, static_cast<int8_t>(launch.device())})) {}
  ~Scratch() {
    if (allocation_.release)
      allocation_.release(allocation_.context, allocation_.data, allocation_.nbytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T = void>
  T* data() const {
    return static_cast<T*>(allocation_.data);
  }

 private:
  Allocation allocation_;
};

}  // namespace vt::cuda
