// Devices and the calling thread's current one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/device.h"

namespace vt::cuda {

inline constexpr int kMaxDevices = 64;

/// What kernels ask about a device, read once.
struct DeviceProperties {
  std::string name;
  int major = 0, minor = 0;
  int multiprocessors = 0;
  int64_t total_memory = 0;         // bytes
  int64_t l2_cache = 0;             // bytes
  int shared_memory_per_block = 0;  // bytes, the opt-in limit
  int max_threads_per_sm = 0;
  int warp_size = 32;
  int pci_bus = 0, pci_device = 0, pci_domain = 0;
};

/// Usable devices; 0, with the reason in device_problem(), where there is no driver.
int device_count();
std::string device_problem();
const DeviceProperties& properties(int device);

/// The calling thread's current device, as the driver's runtime has it.
int current_device();
void set_device(int device);
void synchronize_device(int device);
struct MemoryInfo {
  size_t free = 0, total = 0;  // bytes
};
MemoryInfo memory_info(int device);
/// As the runtime numbers them: 13000 for 13.0.
int runtime_version();
int driver_version();
/// The architectures this library has code for, as CMake lists them ("80-real,90a-real").
std::string built_architectures();
bool can_access_peer(int device, int peer);
/// Lets kernels and copies on `device` read `peer`'s memory. False where the hardware cannot.
bool enable_peer_access(int device, int peer);

/// Makes a device current for a scope. Costs one cheap runtime call when it already is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : old_(current_device()) {
    if (device != old_) set_device(device);
    changed_ = device != old_;
  }
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int old_;
  bool changed_;
};

}  // namespace vt::cuda
