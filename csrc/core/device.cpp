#include "core/device.h"

#include <charconv>

#include "core/error.h"

namespace vt {

Device parse_device(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view kind = text.substr(0, colon);
  Device device;
  if (kind == "cpu") {
    device.type = DeviceType::CPU;
  } else if (kind == "cuda") {
    device.type = DeviceType::CUDA;
  } else {
    fail("Expected one of cpu, cuda device type at start of device string: ", text);
  }
  device.index = -1;
  if (colon != std::string_view::npos) {
    const std::string_view digits = text.substr(colon + 1);
    int index = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    check(error == std::errc() && end == digits.data() + digits.size() && index >= 0 && index < 128,
          "Invalid device string: '", text, "'");
    device.index = static_cast<int8_t>(index);
  }
  if (device.type == DeviceType::CPU) {
    check(device.index <= 0, "Invalid device string: '", text, "': there is one cpu device");
    device.index = 0;
  }
  return device;
}

std::string device_name(Device device) {
  if (device.is_cpu()) return "cpu";
  if (device.index < 0) return "cuda";
  return "cuda:" + std::to_string(device.index);
}

}  // namespace vt
