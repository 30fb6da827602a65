#include "cuda/allocator/history.h"

#include <algorithm>
#include <chrono>
#include <iterator>

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

void History::configure(const HistoryOptions& options) {
  const bool keep = !options.clear && options.mode != HistoryMode::Off;
  std::vector<TraceEntry> dropped;  // their contexts go after the lock
  const std::lock_guard lock(mutex_);
  std::rotate(ring_.begin(), ring_.begin() + static_cast<ptrdiff_t>(next_), ring_.end());
  next_ = 0;
  if (!keep) {
    dropped.swap(ring_);
  } else if (ring_.size() > options.max_entries) {
    const auto rest = ring_.end() - static_cast<ptrdiff_t>(options.max_entries);
    dropped.assign(std::make_move_iterator(ring_.begin()), std::make_move_iterator(rest));
    ring_.erase(ring_.begin(), rest);
  }
  max_entries_ = options.max_entries;
  const HistoryContexts contexts = options.contexts;
  capture_.store(contexts == HistoryContexts::None ? nullptr : options.capture);
  capture_free_.store(contexts == HistoryContexts::All ? options.capture_free : nullptr);
  events_have_contexts_.store(contexts >= HistoryContexts::Alloc);
  skipped_.store(options.skipped);
  mode_.store(options.mode);
}

AllocationContext History::capture_context() const {
  const CaptureContext capture = capture_.load();
  return capture ? capture() : nullptr;
}

AllocationContext History::capture_free_context() const {
  if (mode_.load(std::memory_order_relaxed) != HistoryMode::All) return nullptr;
  const CaptureContext capture = capture_free_.load();
  return capture ? capture() : nullptr;
}

void History::clear() {
  std::vector<TraceEntry> dropped;
  const std::lock_guard lock(mutex_);
  dropped.swap(ring_);
  next_ = 0;
}

void History::record(TraceAction action, uintptr_t address, size_t size, StreamHandle stream,
                     MempoolId pool, AllocationContext context) {
  if (mode_.load(std::memory_order_relaxed) != HistoryMode::All) return;
  if (skipped_.load(std::memory_order_relaxed) >> static_cast<int>(action) & 1) return;
  if (!events_have_contexts_.load(std::memory_order_relaxed)) context.reset();
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
