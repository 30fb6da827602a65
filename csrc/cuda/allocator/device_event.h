// An event of a DeviceApi, shared by those who wait for what it stands for.
#pragma once

#include "cuda/allocator/device_api.h"

namespace vt::cuda {

class DeviceEvent {
 public:
  /// Throws where the device refuses. `device` must outlive the event.
  explicit DeviceEvent(DeviceApi& device);
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  /// Stands for the work given to `stream` so far.
  void record(StreamHandle stream);
  /// Makes `stream` wait for it; nothing if nothing was recorded.
  void order(StreamHandle stream) const;
  /// The host waits for it; nothing if nothing was recorded.
  void wait() const;
  /// False while the work is under way. True also where the device has failed: nothing runs there
  /// any longer.
  bool passed() const;

 private:
  DeviceApi& device_;
  EventHandle event_ = nullptr;
  bool recorded_ = false;
};

}  // namespace vt::cuda
