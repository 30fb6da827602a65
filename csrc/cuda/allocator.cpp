#include "cuda/allocator.h"

#include <cstdint>
#include <mutex>

#include "cuda/error.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

/// The driver gives a pool's memory back at every synchronization unless told to keep it.
void keep_memory(int device) {
  static std::once_flag once[kMaxDevices];
  std::call_once(once[device], [device] {
    cudaMemPool_t pool;
    check_cuda(cudaDeviceGetDefaultMemPool(&pool, device), "getting the memory pool");
    uint64_t keep = UINT64_MAX;
    check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep),
               "setting up the memory pool");
  });
}

void release_async(void* context, void* data, size_t) noexcept {
  cudaFreeAsync(data, static_cast<cudaStream_t>(context));
}

class AsyncAllocator final : public Allocator {
 public:
  Allocation allocate(size_t nbytes, Device device) override {
    if (nbytes == 0) return {};
    const DeviceGuard guard(device.index);
    keep_memory(device.index);
    const Stream stream = current_stream(device.index);
    void* data = nullptr;
    const cudaError_t error = cudaMallocAsync(&data, nbytes, stream.handle);
    if (error != cudaSuccess) {
      cudaGetLastError();
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      fail(ErrorKind::OutOfMemory, "CUDA out of memory. Tried to allocate ", nbytes, " bytes on ",
           device, "; ", free, " of ", total, " bytes are free.");
    }
    return {data, nbytes, stream.handle, release_async};
  }
};

void release_pinned(void*, void* data, size_t) noexcept { cudaFreeHost(data); }

}  // namespace

void install_allocator() {
  static AsyncAllocator* allocator = new AsyncAllocator;  // outlives every tensor
  set_allocator(DeviceType::CUDA, allocator);
}

void empty_cache() {
  for (int device = 0; device < device_count(); ++device) {
    cudaMemPool_t pool;
    check_cuda(cudaDeviceGetDefaultMemPool(&pool, device), "getting the memory pool");
    check_cuda(cudaMemPoolTrimTo(pool, 0), "releasing cached memory");
  }
}

Allocation allocate_pinned(size_t nbytes) {
  if (nbytes == 0) return {};
  void* data = nullptr;
  check_cuda(cudaHostAlloc(&data, nbytes, cudaHostAllocPortable), "allocating page-locked memory");
  return {data, nbytes, nullptr, release_pinned};
}

bool is_pinned(const void* pointer) {
  if (!pointer || device_count() == 0) return false;
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeHost;
}

}  // namespace vt::cuda
