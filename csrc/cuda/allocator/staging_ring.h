// Page-locked memory in which the host prepares what the device is told with each run of a graph.
// While runs that read a slot are under way the host fills another one.
#pragma once

#include <memory>
#include <vector>

#include "cuda/allocator/device_event.h"
#include "cuda/allocator/pinned_allocator.h"

namespace vt::cuda {

class StagingRing {
 public:
  /// Slots of `nbytes`. Both others must outlive the ring; it must outlive the work that reads it.
  StagingRing(DeviceApi& device, PinnedAllocator& memory, size_t nbytes);
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  size_t slots() const { return events_.size(); }
  /// The slot to fill; waits until the work that last read it is done. The same until sent().
  std::byte* current();
  /// All work that reads the current slot has been given to `stream`. Throws if the device refuses
  /// to tell when it is done, having waited for it.
  void sent(StreamHandle stream);
  /// What `stream` was given since belongs to the work that was sent last.
  void extend(StreamHandle stream);
  /// The first slot, and how far apart they are. They are used in turn, from the first on.
  const std::byte* data() const { return static_cast<const std::byte*>(memory_.data); }
  size_t pitch() const { return pitch_; }
  /// Passes when all work is done that was sent so far; null before the first.
  const std::shared_ptr<DeviceEvent>& last() const { return last_; }

 private:
  DeviceApi& device_;
  Allocation memory_;
  size_t pitch_;
  std::vector<std::shared_ptr<DeviceEvent>> events_;  // one a slot
  size_t at_ = 0;
  std::shared_ptr<DeviceEvent> last_;
};

}  // namespace vt::cuda
