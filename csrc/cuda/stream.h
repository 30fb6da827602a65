// Streams and events. Each thread has a current stream per device, at first the device's default
// stream; ops run on the current stream of the device their tensors are on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device.h"

namespace vt::cuda {

/// A stream of our pool, the default stream (null handle), or one made elsewhere. Not owned:
/// pool streams live as long as the process.
struct Stream {
  cudaStream_t handle = nullptr;
  int device = 0;
  friend bool operator==(const Stream&, const Stream&) = default;
};

namespace detail {
extern thread_local constinit cudaStream_t current_streams[kMaxDevices];
extern thread_local constinit bool capturing;
}  // namespace detail
inline Stream current_stream(int device) { return {detail::current_streams[device], device}; }
/// Whether the calling thread is handing kernel calls over to a graph (graph.h): nothing runs, so
/// the host cannot wait for anything, and addresses must stay good for as long as the graph lives.
inline bool capturing() { return detail::capturing; }
/// Whether work given to the stream becomes part of a graph, ours or another's.
bool is_captured(Stream stream);
void set_current_stream(Stream stream);
/// A stream of the pool, handed out in turn. Priority: 0 normal, negative higher.
Stream pool_stream(int device, int priority);
/// Lowest and highest priority, as the driver numbers them.
void priority_range(int* lowest, int* highest);

bool query(Stream stream);
void synchronize(Stream stream);
int priority(Stream stream);

/// Work done up to a point of a stream. Made on the first record, on that stream's device.
class Event {
 public:
  explicit Event(bool timing = false, bool blocking = false, bool interprocess = false);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Stream stream);
  /// Makes `stream` wait for what was recorded; nothing if nothing was.
  void wait(Stream stream) const;
  bool query() const;
  void synchronize() const;
  /// Milliseconds from this event to `end`; both must have been recorded with timing.
  float elapsed(const Event& end) const;
  cudaEvent_t handle() const { return event_; }
  int device() const { return device_; }

 private:
  unsigned flags_;
  cudaEvent_t event_ = nullptr;
  int device_ = -1;
};

}  // namespace vt::cuda
