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

  explicit CudaAllocator(CurrentStream current_stream) : current_stream_(current_stream) {}

  /// Both must outlive this.
  void add_device(CachingAllocator* allocator) {
    devices_.at(static_cast<size_t>(allocator->device_index())).store(allocator);
  }
  /// Throws Value when the device is not there.
  CachingAllocator& device(int index) const {
    CachingAllocator* allocator =
        index >= 0 && index < kMaxDevices
            ? devices_[static_cast<size_t>(index)].load(std::memory_order_acquire)
            : nullptr;
    check_value(allocator != nullptr, "cuda:", index, " is not available");
    return *allocator;
  }

  Allocation allocate(size_t nbytes, Device where) override {
    return device(where.index).allocate(nbytes, current_stream_(where.index));
  }

 private:
  CurrentStream current_stream_;
  std::array<std::atomic<CachingAllocator*>, kMaxDevices> devices_{};
};

}  // namespace vt::cuda
