#include "cuda/allocator/device_event.h"

#include "core/error.h"

namespace vt::cuda {
namespace {

void require(const ApiStatus& status, const char* what) {
  check(status.ok(), status.message, " while ", what);
}

}  // namespace

DeviceEvent::DeviceEvent(DeviceApi& device) : device_(device) {
  require(device_.create_event(&event_), "creating an event");
}

DeviceEvent::~DeviceEvent() { device_.destroy_event(event_); }

void DeviceEvent::record(StreamHandle stream) {
  require(device_.record_event(event_, stream), "recording an event");
  recorded_ = true;
}

void DeviceEvent::order(StreamHandle stream) const {
  if (recorded_) require(device_.wait_event(stream, event_), "ordering two streams");
}

void DeviceEvent::wait() const {
  if (recorded_) require(device_.synchronize_event(event_), "waiting for an event");
}

bool DeviceEvent::passed() const {
  if (!recorded_) return true;
  const ApiStatus status = device_.query_event(event_);
  return status.code != ApiCode::NotReady && status.code != ApiCode::Capturing;
}

}  // namespace vt::cuda
