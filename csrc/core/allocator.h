// How storages get their bytes. One allocator per device type; a backend registers its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/device.h"

namespace vt {

/// An allocation: the bytes and how to give them back. `release(context, data, nbytes)` runs once.
struct Allocation {
  void* data = nullptr;
  size_t nbytes = 0;
  void* context = nullptr;
  void (*release)(void* context, void* data, size_t nbytes) noexcept = nullptr;
};

class Allocator {
 public:
  virtual ~Allocator() = default;
  /// At least `nbytes` bytes aligned to 64 (CPU) or 512 (CUDA). Zero bytes give a null pointer.
  /// Throws OutOfMemory naming the size asked for.
  virtual Allocation allocate(size_t nbytes, Device device) = 0;
};

Allocator& allocator_for(DeviceType type);
/// Called by a backend as it loads; the allocator must outlive the process.
void set_allocator(DeviceType type, Allocator* allocator);

}  // namespace vt
