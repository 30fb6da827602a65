#include "core/storage.h"

#include "core/device_backend.h"
#include "core/error.h"
#include "core/storage_observer.h"

namespace vt {
namespace {

std::atomic<int64_t> live_storages{0};
Allocator* allocators[kNumDeviceTypes] = {};
thread_local constinit StorageObserver* observer = nullptr;

}  // namespace

Allocator& allocator_for(DeviceType type) {
  Allocator* allocator = allocators[static_cast<int>(type)];
  if (!allocator) [[unlikely]] {
    backend_for(type);
    allocator = allocators[static_cast<int>(type)];
    check(allocator != nullptr, "no CUDA device can be used: ", backend_problem(type));
  }
  return *allocator;
}

void set_allocator(DeviceType type, Allocator* allocator) {
  allocators[static_cast<int>(type)] = allocator;
}

Storage::Storage(Allocation allocation, Device device) : allocation_(allocation), device_(device) {
  live_storages.fetch_add(1, std::memory_order_relaxed);
}

Storage::~Storage() {
  live_storages.fetch_sub(1, std::memory_order_relaxed);
  if (allocation_.release)
    allocation_.release(allocation_.context, allocation_.data, allocation_.nbytes);
}

void Storage::replace(Allocation allocation) {
  const Allocation old = allocation_;
  allocation_ = allocation;
  if (old.release) old.release(old.context, old.data, old.nbytes);
}

int64_t Storage::live_count() { return live_storages.load(std::memory_order_relaxed); }

Ref<Storage> allocate_storage(size_t nbytes, Device device) {
  if (observer && observer->bytes_later(device)) [[unlikely]] {
    auto storage = make_ref<Storage>(Allocation{nullptr, nbytes, nullptr, nullptr}, device);
    observer->allocated(*storage);
    return storage;
  }
  auto storage = make_ref<Storage>(allocator_for(device.type).allocate(nbytes, device), device);
  if (observer) [[unlikely]]
    observer->allocated(*storage);
  return storage;
}

StorageObserver* storage_observer() { return observer; }
void set_storage_observer(StorageObserver* wanted) { observer = wanted; }

}  // namespace vt
