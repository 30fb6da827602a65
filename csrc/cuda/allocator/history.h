// The record of what the allocator did: a ring of events, each with the context that a
// user-supplied function captured (Python gives frames). Costs one branch while it is off.
//
// An event of a free has the context of the free where one could be captured, else that of the
// allocation.
#pragma once

#include <atomic>
#include <cstdint>
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
using CaptureContext = AllocationContext (*)() noexcept;

/// Where contexts are kept; each includes the ones before it.
enum class HistoryContexts : uint8_t {
  None,
  State,  // live blocks and segments
  Alloc,  // events, with what allocated the memory
  All,    // events of frees with what freed it
};

struct HistoryOptions {
  HistoryMode mode = HistoryMode::Off;
  HistoryContexts contexts = HistoryContexts::All;
  CaptureContext capture = nullptr;  // may be null; called without any lock held
  /// For frees: may be null; called without a lock of the allocator, but on any thread and maybe
  /// with locks of the caller held, so it must not block.
  CaptureContext capture_free = nullptr;
  size_t max_entries = SIZE_MAX;
  uint32_t skipped = 0;  // bit n: no events of TraceAction n
  bool clear = true;     // forget the events recorded so far; turning off forgets them always
};

class History {
 public:
  void configure(const HistoryOptions& options);
  bool on() const { return mode_.load(std::memory_order_relaxed) != HistoryMode::Off; }
  AllocationContext capture_context() const;
  AllocationContext capture_free_context() const;
  void record(TraceAction action, uintptr_t address, size_t size, StreamHandle stream,
              MempoolId pool, AllocationContext context);
  /// Oldest first.
  std::vector<TraceEntry> entries() const;
  void clear();

 private:
  std::atomic<HistoryMode> mode_{HistoryMode::Off};
  std::atomic<CaptureContext> capture_{nullptr}, capture_free_{nullptr};
  std::atomic<bool> events_have_contexts_{true};
  std::atomic<uint32_t> skipped_{0};
  mutable std::mutex mutex_;
  std::vector<TraceEntry> ring_;
  size_t next_ = 0;  // where the ring is written once it is full
  size_t max_entries_ = 0;
};

}  // namespace vt::cuda
