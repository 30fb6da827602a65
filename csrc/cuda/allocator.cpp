#include "cuda/allocator.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/host_wait.h"
#include "cuda/allocator/cuda_allocator.h"
#include "cuda/driver_device.h"
#include "cuda/error.h"
#include "cuda/graph.h"
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

// Guards the making of allocators, and what new ones are told.
std::mutex making;
HistoryOptions history_options;
std::vector<CachingAllocator::OutOfMemoryObserver>& observers() {
  static auto* all = new std::vector<CachingAllocator::OutOfMemoryObserver>;
  return *all;
}

CachingAllocator* make_device_allocator(int device) {
  const HostWait waiting;  // this may start the device
  const std::lock_guard lock(making);
  if (CachingAllocator* known = allocators().find(device)) return known;
  if (device < 0 || device >= device_count()) return nullptr;
  auto made =
      std::make_unique<CachingAllocator>(driver_of(device), device, settings_from_environment());
  made->record_history(history_options);
  for (const auto& observer : observers()) made->add_out_of_memory_observer(observer);
  allocators().add_device(made.get());
  return made.release();
}

std::atomic<PinnedAllocator*> pinned_in_use{nullptr};

std::atomic<StartHook> before_start{nullptr};

}  // namespace

DeviceApi& driver_of(int device) {
  static std::array<std::atomic<DeviceApi*>, kMaxDevices> made{};
  std::atomic<DeviceApi*>& slot = made[static_cast<size_t>(device)];
  if (DeviceApi* known = slot.load(std::memory_order_acquire)) [[likely]]
    return *known;
  // Starting a device takes long, and may fail; of two made at the same time the first stays.
  const HostWait waiting;
  if (const StartHook hook = before_start) hook(device);
  auto fresh = std::make_unique<DriverDevice>(device);
  DeviceApi* first = nullptr;
  if (slot.compare_exchange_strong(first, fresh.get())) first = fresh.release();
  return *first;
}

void set_before_start(StartHook hook) { before_start = hook; }

void install_allocator() { set_allocator(DeviceType::CUDA, &allocators()); }

CachingAllocator& device_allocator(int device) { return allocators().device(device); }

CachingAllocator* device_allocator_if_used(int device) { return allocators().find(device); }

PinnedAllocator& pinned_allocator() {
  if (PinnedAllocator* made = pinned_in_use.load(std::memory_order_acquire)) [[likely]]
    return *made;
  const HostWait waiting;  // this may start the device
  const std::lock_guard lock(making);
  if (!pinned_in_use) {
    pinned_in_use =
        std::make_unique<PinnedAllocator>(driver_of(current_device()), settings_from_environment())
            .release();  // never destroyed
  }
  return *pinned_in_use;
}

void record_stream(const Storage& storage, Stream stream) {
  check(stream.device >= 0 && stream.device < device_count(), "record_stream: no device ",
        stream.device, " for the stream");
  const Allocation& allocation = storage.allocation();
  if (CachingAllocator::made(allocation.release)) {
    device_allocator(storage.device().index)
        .record_stream(allocation.context, stream.handle, driver_of(stream.device));
  } else if (PinnedAllocator::made(allocation.release)) {
    pinned_allocator().record_stream(allocation.context, stream.handle, driver_of(stream.device));
  }
}

void record_history(const HistoryOptions& options) {
  const std::lock_guard lock(making);
  history_options = options;
  for (int device = 0; device < device_count(); ++device) {
    if (CachingAllocator* made = allocators().find(device)) made->record_history(options);
  }
}

void add_out_of_memory_observer(CachingAllocator::OutOfMemoryObserver observer) {
  const std::lock_guard lock(making);
  for (int device = 0; device < device_count(); ++device) {
    if (CachingAllocator* made = allocators().find(device)) {
      made->add_out_of_memory_observer(observer);
    }
  }
  observers().push_back(std::move(observer));
}

PinnedStats pinned_stats() {
  PinnedAllocator* pinned = pinned_in_use;
  return pinned ? pinned->stats() : PinnedStats{};
}

PinnedAllocator* pinned_allocator_if_used() { return pinned_in_use; }

void empty_cache() {
  const HostWait waiting;  // memory is unmapped when the work that used it is done
  collect_graphs();
  for (int device = 0; device < device_count(); ++device) {
    if (CachingAllocator* allocator = device_allocator_if_used(device)) allocator->empty_cache();
  }
  if (PinnedAllocator* pinned = pinned_in_use) pinned->empty_cache();
}

void release_stream(Stream stream) {
  const HostWait waiting;
  synchronize(stream);
  for (int device = 0; device < device_count(); ++device) {
    CachingAllocator* allocator = device_allocator_if_used(device);
    if (allocator && device == stream.device) allocator->release_stream(stream.handle);
    if (allocator && device != stream.device) allocator->process_pending();
  }
  if (PinnedAllocator* pinned = pinned_in_use) pinned->process_pending();
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

int device_of(const void* pointer) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  const bool device =
      attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return device ? attributes.device : -1;
}

}  // namespace vt::cuda
