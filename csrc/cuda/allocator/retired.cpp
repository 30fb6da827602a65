#include "cuda/allocator/retired.h"

#include <algorithm>
#include <utility>

namespace vt::cuda {

void RetiredList::add(std::shared_ptr<DeviceEvent> last_use, std::shared_ptr<void> object) {
  if (!last_use || last_use->passed()) return;
  const std::lock_guard lock(mutex_);
  entries_.push_back({std::move(last_use), std::move(object)});
}

size_t RetiredList::collect() {
  std::vector<Entry> done;  // destroyed after the lock is given back
  const std::lock_guard lock(mutex_);
  const auto first = std::stable_partition(entries_.begin(), entries_.end(),
                                           [](const Entry& e) { return !e.last_use->passed(); });
  done.assign(std::make_move_iterator(first), std::make_move_iterator(entries_.end()));
  entries_.erase(first, entries_.end());
  return entries_.size();
}

size_t RetiredList::size() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

}  // namespace vt::cuda
