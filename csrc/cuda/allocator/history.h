// The record of what the allocator did: a ring of events, each with the context that a
// user-supplied function captured (Python gives frames). Costs one branch while it is off.
#pragma once

#include <atomic>
#include <mutex>
#include <string_view>
#include <vector>

#include "cuda/allocator/block.h"
#include "cuda/allocator/mempool.h"

namespace vt::cuda {

enum class TraceAction : uint8_t {
  Alloc,
  FreeRequested,  // given back by its owner
  FreeCompleted,  // may be handed out again
  SegmentAlloc,
  SegmentFree,
  SegmentMap,
  SegmentUnmap,
  Oom,  // `address` is the device's free memory
  Snapshot,
};
/// torch's name of it: "alloc", "free_requested", …
std::string_view trace_action_name(TraceAction action);

struct TraceEntry {
  TraceAction action = TraceAction::Alloc;
  uintptr_t address = 0;
  size_t size = 0;
  StreamHandle stream = nullptr;
  MempoolId pool{};
  int64_t time_us = 0;  // since the epoch
  AllocationContext context{};
};

enum class HistoryMode : uint8_t {
  Off,
  State,  // contexts of live blocks and segments only
  All,    // and the ring of events
};
using CaptureContext = AllocationContext (*)();

class History {
 public:
  /// Clears what was recorded. `capture` may be null; it is called without any lock held.
  void configure(HistoryMode mode, CaptureContext capture, size_t max_entries);
  bool on() const { return mode_.load(std::memory_order_relaxed) != HistoryMode::Off; }
  AllocationContext capture_context() const;
  void record(TraceAction action, uintptr_t address, size_t size, StreamHandle stream,
              MempoolId pool, AllocationContext context);
  /// Oldest first.
  std::vector<TraceEntry> entries() const;

 private:
  std::atomic<HistoryMode> mode_{HistoryMode::Off};
  std::atomic<CaptureContext> capture_{nullptr};
  mutable std::mutex mutex_;
  std::vector<TraceEntry> ring_;
  size_t next_ = 0;  // where the ring is written once it is full
  size_t max_entries_ = 0;
};

}  // namespace vt::cuda
