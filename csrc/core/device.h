// A device: where a tensor's bytes live and which backend's kernels run on it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace vt {

enum class DeviceType : uint8_t { CPU, CUDA };
inline constexpr int kNumDeviceTypes = 2;

struct Device {
  DeviceType type = DeviceType::CPU;
  int8_t index = 0;

  constexpr bool is_cpu() const { return type == DeviceType::CPU; }
  constexpr bool is_cuda() const { return type == DeviceType::CUDA; }
  friend constexpr bool operator==(Device, Device) = default;
};

/// Parses "cpu", "cuda", "cuda:1". An index that is left out is reported as -1 (the current one).
Device parse_device(std::string_view text);
std::string device_name(Device device);

}  // namespace vt
