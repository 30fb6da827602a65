// Keeps captures and waits for a whole device apart. The driver gives a capture up when any thread
// waits for the device of the captured stream, and refuses the wait: here each waits for the other.
#pragma once

namespace vt::cuda {

/// A scope in which a stream of the device may be captured. Waits, with what the embedding language
/// holds let go of, until nobody waits for the device; so take no lock before it.
class CaptureScope {
 public:
  explicit CaptureScope(int device);
  ~CaptureScope();
  CaptureScope(const CaptureScope&) = delete;
  CaptureScope& operator=(const CaptureScope&) = delete;

 private:
  int device_;
};

/// A scope in which the calling thread may wait for the device. Enter it inside a HostWait. In a
/// thread that is capturing it does nothing: the driver refuses its wait.
class DeviceWaitScope {
 public:
  explicit DeviceWaitScope(int device);
  ~DeviceWaitScope();
  DeviceWaitScope(const DeviceWaitScope&) = delete;
  DeviceWaitScope& operator=(const DeviceWaitScope&) = delete;

 private:
  int device_;
  bool entered_;
};

}  // namespace vt::cuda
