#include "cuda/capture_gate.h"

#include <array>
#include <condition_variable>
#include <mutex>

#include "core/host_wait.h"
#include "cuda/device.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

struct Gate {
  std::mutex mutex;
  std::condition_variable changed;
  // Under way, or about to begin: threads that wait in a loop do not hold them up.
  int captures = 0;
  int waits = 0;
};
Gate& gate_of(int device) {
  static auto* gates = new std::array<Gate, kMaxDevices>;
  return (*gates)[static_cast<size_t>(device)];
}

}  // namespace

CaptureScope::CaptureScope(int device) : device_(device) {
  Gate& gate = gate_of(device);
  {
    const std::lock_guard lock(gate.mutex);
    ++gate.captures;
    if (gate.waits == 0) return;
  }
  const HostWait waiting;
  std::unique_lock lock(gate.mutex);
  gate.changed.wait(lock, [&] { return gate.waits == 0; });
}
CaptureScope::~CaptureScope() {
  Gate& gate = gate_of(device_);
  {
    const std::lock_guard lock(gate.mutex);
    --gate.captures;
  }
  gate.changed.notify_all();
}

DeviceWaitScope::DeviceWaitScope(int device) : device_(device), entered_(!capturing()) {
  if (!entered_) return;
  Gate& gate = gate_of(device);
  std::unique_lock lock(gate.mutex);
  gate.changed.wait(lock, [&] { return gate.captures == 0; });
  ++gate.waits;
}
DeviceWaitScope::~DeviceWaitScope() {
  if (!entered_) return;
  Gate& gate = gate_of(device_);
  {
    const std::lock_guard lock(gate.mutex);
    --gate.waits;
  }
  gate.changed.notify_all();
}

}  // namespace vt::cuda
