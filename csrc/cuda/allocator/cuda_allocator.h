// The runtime's allocator of CUDA storages: the caching allocator of the device asked for, on the
// calling thread's current stream. The CUDA library installs it with vt::set_allocator.
#pragma once

#include <array>
#include <atomic>

#include "core/allocator.h"
#include "core/error.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {

class CudaAllocator final : public Allocator {
 public:
  static constexpr int kMaxDevices = 128;
  /// The calling thread's current stream on a device.
  using CurrentStream = StreamHandle (*)(int device_index);

  /// Makes a device's allocator when it is first needed, and gives it to add_device; null where
  /// there is none. Called by any thread, also for a device that another thread is just adding.
  using MakeDevice = CachingAllocator* (*)(int device_index);

  explicit CudaAllocator(CurrentStream current_stream, MakeDevice make = nullptr)
      : current_stream_(current_stream), make_(make) {}

  /// Both must outlive this.
  void add_device(CachingAllocator* allocator) {
    devices_.at(static_cast<size_t>(allocator->device_index())).store(allocator);
  }
  /// The allocator of a device, or null where none has been added.
  CachingAllocator* find(int index) const {
    return index >= 0 && index < kMaxDevices
               ? devices_[static_cast<size_t>(index)].load(std::memory_order_acquire)
               : nullptr;
  }
  /// Throws Value when the device is not there.
  CachingAllocator& device(int index) const {
    CachingAllocator* allocator = find(index);
    if (!allocator && make_) allocator = make_(index);
    check_value(allocator != nullptr, "cuda:", index, " is not available");
    return *allocator;
  }

  Allocation allocate(size_t nbytes, Device where) override {
    return device(where.index).allocate(nbytes, current_stream_(where.index));
  }

 private:
  CurrentStream current_stream_;
  MakeDevice make_;
  std::array<std::atomic<CachingAllocator*>, kMaxDevices> devices_{};
};

}  // namespace vt::cuda
