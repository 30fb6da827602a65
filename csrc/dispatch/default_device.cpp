#include "dispatch/default_device.h"

#include "core/device_backend.h"

namespace vt {

thread_local constinit DefaultDevice default_device_choice;

Device default_device() { return default_device_choice.device; }

void set_default_device(Device device) {
  resolve_device(device);
  default_device_choice = {device, true};
}

}  // namespace vt
