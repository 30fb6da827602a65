#include "cuda/allocator/history.h"

#include <algorithm>
#include <chrono>

namespace vt::cuda {

std::string_view trace_action_name(TraceAction action) {
  switch (action) {
    case TraceAction::Alloc:
      return "alloc";
    case TraceAction::FreeRequested:
      return "free_requested";
    case TraceAction::FreeCompleted:
      return "free_completed";
    case TraceAction::SegmentAlloc:
      return "segment_alloc";
    case TraceAction::SegmentFree:
      return "segment_free";
    case TraceAction::SegmentMap:
      return "segment_map";
    case TraceAction::SegmentUnmap:
      return "segment_unmap";
    case TraceAction::Oom:
      return "oom";
    case TraceAction::Snapshot:
      return "snapshot";
  }
  return "?";
}

void History::configure(HistoryMode mode, CaptureContext capture, size_t max_entries) {
  std::vector<TraceEntry> dropped;  // its contexts go after the lock
  const std::lock_guard lock(mutex_);
  dropped.swap(ring_);
  next_ = 0;
  max_entries_ = max_entries;
  capture_.store(capture);
  mode_.store(mode);
}

AllocationContext History::capture_context() const {
  const CaptureContext capture = capture_.load();
  return capture ? capture() : nullptr;
}

void History::record(TraceAction action, uintptr_t address, size_t size, StreamHandle stream,
                     MempoolId pool, AllocationContext context) {
  if (mode_.load(std::memory_order_relaxed) != HistoryMode::All) return;
  using namespace std::chrono;
  const int64_t now = duration_cast<microseconds>(system_clock::now().time_since_epoch()).count();
  TraceEntry entry{action, address, size, stream, pool, now, std::move(context)};
  const std::lock_guard lock(mutex_);
  if (max_entries_ == 0) return;
  if (ring_.size() < max_entries_) {
    try {
      ring_.push_back(std::move(entry));
    } catch (const std::bad_alloc&) {
      // The record is a convenience; the allocation it tells of must not fail for it.
    }
    return;
  }
  std::swap(ring_[next_], entry);
  next_ = (next_ + 1) % max_entries_;
}

std::vector<TraceEntry> History::entries() const {
  const std::lock_guard lock(mutex_);
  std::vector<TraceEntry> out = ring_;
  std::rotate(out.begin(), out.begin() + static_cast<ptrdiff_t>(next_), out.end());
  return out;
}

}  // namespace vt::cuda
