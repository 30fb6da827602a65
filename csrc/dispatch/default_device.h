// The device of new tensors that name none: set_default_device and `with torch.device(...)`.
#pragma once

#include "core/device.h"

namespace vt {

/// Per thread, as in torch. `chosen` tells a default that was set from the CPU nobody asked for:
/// only the former moves data that already has a device (`tensor(t)`, `as_tensor(t)`).
struct DefaultDevice {
  Device device;  // index -1: the current CUDA device at the time of use
  bool chosen = false;
};
extern thread_local constinit DefaultDevice default_device_choice;

/// One thread-local read; the index may be -1, which `empty` resolves.
Device default_device();
/// Makes `device` the calling thread's default. Throws if its backend has no such device.
void set_default_device(Device device);

}  // namespace vt
