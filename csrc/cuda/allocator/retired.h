// What was dropped while the device may still use it. It is destroyed once the device is done, by
// whoever passes here next: no thread waits, and none is surprised by another's clean-up.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/allocator/device_event.h"

namespace vt::cuda {

class RetiredList {
 public:
  /// Destroys `object` once `last_use` has passed, at once if it has or is null. From any thread;
  /// the object's destructor runs without locks held.
  void add(std::shared_ptr<DeviceEvent> last_use, std::shared_ptr<void> object);
  /// Destroys what the device is done with. Returns how many are left.
  size_t collect();
  size_t size() const;

 private:
  struct Entry {
    std::shared_ptr<DeviceEvent> last_use;
    std::shared_ptr<void> object;
  };
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace vt::cuda
