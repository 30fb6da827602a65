#include "cuda/stream.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "core/host_wait.h"
#include "cuda/error.h"

namespace vt::cuda {

namespace detail {
thread_local constinit cudaStream_t current_streams[kMaxDevices] = {};
thread_local constinit bool capturing = false;
}  // namespace detail

namespace {

constexpr int kPoolSize = 32;
constexpr int kPriorities = 6;  // what the hardware has today; more are folded together

struct Pool {
  std::array<std::atomic<cudaStream_t>, kPoolSize> streams{};
  std::atomic<uint32_t> next{0};
};
Pool pools[kMaxDevices][kPriorities];
std::mutex pool_mutex;

}  // namespace

void set_current_stream(Stream stream) { detail::current_streams[stream.device] = stream.handle; }

void priority_range(int* lowest, int* highest) {
  check_cuda(cudaDeviceGetStreamPriorityRange(lowest, highest), "reading stream priorities");
}

Stream pool_stream(int device, int priority) {
  const DeviceGuard guard(device);
  int lowest = 0, highest = 0;
  priority_range(&lowest, &highest);
  priority = std::clamp(priority, std::max(highest, lowest - kPriorities + 1), lowest);
  Pool& pool = pools[device][lowest - priority];
  std::atomic<cudaStream_t>& slot = pool.streams[pool.next++ % kPoolSize];
  if (!slot.load()) {
    const std::lock_guard lock(pool_mutex);
    if (!slot.load()) {
      cudaStream_t stream;
      check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority),
                 "creating a stream");
      slot.store(stream);
    }
  }
  return {slot.load(), device};
}

bool is_captured(Stream stream) {
  if (!stream.handle) return false;  // the default stream cannot be
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream.handle, &status), "asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

bool query(Stream stream) {
  const DeviceGuard guard(stream.device);
  const cudaError_t error = cudaStreamQuery(stream.handle);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check_cuda(error, "querying a stream");
  return true;
}

void synchronize(Stream stream) {
  const DeviceGuard guard(stream.device);
  const HostWait waiting;
  check_cuda(cudaStreamSynchronize(stream.handle), "synchronizing a stream");
}

int priority(Stream stream) {
  const DeviceGuard guard(stream.device);
  int value = 0;
  check_cuda(cudaStreamGetPriority(stream.handle, &value), "reading a stream's priority");
  return value;
}

Event::Event(bool timing, bool blocking, bool interprocess)
    : flags_((timing ? 0u : unsigned{cudaEventDisableTiming}) |
             (blocking ? unsigned{cudaEventBlockingSync} : 0u) |
             (interprocess ? unsigned{cudaEventInterprocess} : 0u)) {}

Event::~Event() {
  // At exit the context may be gone already; there is nobody to tell.
  if (event_) cudaEventDestroy(event_);
}

void Event::record(Stream stream) {
  const DeviceGuard guard(stream.device);
  if (!event_) {
    check_cuda(cudaEventCreateWithFlags(&event_, flags_), "creating an event");
    device_ = stream.device;
  }
  check(device_ == stream.device, "Event device ", device_,
        " does not match recording stream's device ", stream.device, ".");
  check_cuda(cudaEventRecord(event_, stream.handle), "recording an event");
}

void Event::wait(Stream stream) const {
  if (!event_) return;
  const DeviceGuard guard(stream.device);
  check_cuda(cudaStreamWaitEvent(stream.handle, event_, 0), "making a stream wait for an event");
}

bool Event::query() const {
  if (!event_) return true;
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check_cuda(error, "querying an event");
  return true;
}

void Event::synchronize() const {
  if (!event_) return;
  const HostWait waiting;
  check_cuda(cudaEventSynchronize(event_), "synchronizing an event");
}

float Event::elapsed(const Event& end) const {
  check(event_ && end.event_, "Both events must be recorded before calculating elapsed time.");
  check(!(flags_ & cudaEventDisableTiming) && !(end.flags_ & cudaEventDisableTiming),
        "Both events must be created with argument 'enable_timing=True'.");
  check(query() && end.query(),
        "Both events must be completed before calculating elapsed time; call synchronize() first.");
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, event_, end.event_), "reading elapsed time");
  return milliseconds;
}

}  // namespace vt::cuda
