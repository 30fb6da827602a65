#include "cuda/allocator.h"

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/driver_device.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

std::array<std::atomic<CachingAllocator*>, kMaxDevices> allocators{};

CachingAllocator& make_device_allocator(int device) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  CachingAllocator* made = allocators[static_cast<size_t>(device)].load();
  if (!made) {
    made = new CachingAllocator(*new DriverDevice(device), device, settings_from_environment());
    allocators[static_cast<size_t>(device)].store(made, std::memory_order_release);
  }
  return *made;
}

class CudaAllocator final : public Allocator {
 public:
  Allocation allocate(size_t nbytes, Device where) override {
    return device_allocator(where.index).allocate(nbytes, current_stream(where.index).handle);
  }
};

}  // namespace

void install_allocator() {
  static auto* allocator = new CudaAllocator;  // outlives every tensor
  set_allocator(DeviceType::CUDA, allocator);
}

CachingAllocator& device_allocator(int device) {
  check(device >= 0 && device < kMaxDevices, "CUDA error: invalid device ordinal ", device);
  CachingAllocator* made = device_allocator_if_used(device);
  return made ? *made : make_device_allocator(device);
}

CachingAllocator* device_allocator_if_used(int device) {
  return allocators[static_cast<size_t>(device)].load(std::memory_order_acquire);
}

PinnedAllocator& pinned_allocator() {
  static auto* instance =
      new PinnedAllocator(*new DriverDevice(current_device()), settings_from_environment());
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
  pinned_allocator().empty_cache();
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
