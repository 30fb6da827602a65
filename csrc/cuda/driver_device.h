// The CUDA driver as the allocators see it (allocator/device_api.h).
#pragma once

#include "cuda/allocator/device_api.h"

namespace vt::cuda {

class DriverDevice final : public DeviceApi {
 public:
  /// Throws if the device cannot be used.
  explicit DriverDevice(int device);

  bool supports_virtual_memory() const override { return granularity_ != 0; }
  bool supports_async_allocation() const override { return async_; }
  size_t granularity() const override { return granularity_; }
  ApiStatus memory_info(size_t* free, size_t* total) override;
  ApiStatus reserve_range(size_t nbytes, uintptr_t* address) override;
  ApiStatus free_range(uintptr_t address, size_t nbytes) override;
  ApiStatus create_physical(size_t nbytes, PhysicalHandle* handle) override;
  ApiStatus release_physical(PhysicalHandle handle) override;
  ApiStatus map(uintptr_t address, size_t nbytes, PhysicalHandle handle) override;
  ApiStatus unmap(uintptr_t address, size_t nbytes) override;
  ApiStatus set_access(uintptr_t address, size_t nbytes) override;
  ApiStatus allocate(size_t nbytes, uintptr_t* address) override;
  ApiStatus free(uintptr_t address) override;
  ApiStatus allocate_async(size_t nbytes, StreamHandle stream, uintptr_t* address) override;
  ApiStatus free_async(uintptr_t address, StreamHandle stream) override;
  ApiStatus trim_async(size_t* released) override;
  ApiStatus create_event(EventHandle* event) override;
  ApiStatus destroy_event(EventHandle event) override;
  ApiStatus record_event(EventHandle event, StreamHandle stream) override;
  ApiStatus query_event(EventHandle event) override;
  ApiStatus synchronize_event(EventHandle event) override;
  ApiStatus wait_event(StreamHandle stream, EventHandle event) override;
  ApiStatus synchronize_stream(StreamHandle stream) override;
  ApiStatus synchronize_device() override;
  ApiStatus capture_id(StreamHandle stream, uint64_t* id) override;
  ApiStatus allocate_host(size_t nbytes, void** data) override;
  ApiStatus free_host(void* data) override;

 private:
  int device_;
  size_t granularity_ = 0;
  bool async_ = false;
};

}  // namespace vt::cuda
