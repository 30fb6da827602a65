#include "cuda/allocator.h"

#include <atomic>
#include <mutex>

#include "cuda/allocator/cuda_allocator.h"
#include "cuda/driver_device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

CachingAllocator* make_device_allocator(int device);

CudaAllocator& allocators() {
  // Never destroyed: it outlives every tensor.
  static auto* instance =
      new CudaAllocator([](int device) -> StreamHandle { return current_stream(device).handle; },
                        make_device_allocator);
  return *instance;
}

CachingAllocator* make_device_allocator(int device) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  CachingAllocator* made = allocators().find(device);
  if (!made && device >= 0 && device < device_count()) {
    made = new CachingAllocator(*new DriverDevice(device), device, settings_from_environment());
    allocators().add_device(made);
  }
  return made;
}

std::atomic<PinnedAllocator*> pinned_in_use{nullptr};

}  // namespace

void install_allocator() { set_allocator(DeviceType::CUDA, &allocators()); }

CachingAllocator& device_allocator(int device) { return allocators().device(device); }

CachingAllocator* device_allocator_if_used(int device) { return allocators().find(device); }

PinnedAllocator& pinned_allocator() {
  static auto* instance = [] {
    auto* made =
        new PinnedAllocator(*new DriverDevice(current_device()), settings_from_environment());
    pinned_in_use = made;
    return made;
  }();
  return *instance;
}

void record_stream(const Storage& storage, cudaStream_t stream) {
  const Allocation& allocation = storage.allocation();
  if (CachingAllocator::made(allocation.release))
    device_allocator(storage.device().index).record_stream(allocation.context, stream);
  else if (PinnedAllocator::made(allocation.release))
    pinned_allocator().record_stream(allocation.context, stream);
}

void empty_cache() {
  for (int device = 0; device < device_count(); ++device) {
    if (CachingAllocator* allocator = device_allocator_if_used(device)) allocator->empty_cache();
  }
  if (PinnedAllocator* pinned = pinned_in_use) pinned->empty_cache();
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
