// The state of an allocator at one time, as plain structs.
#pragma once

#include <string_view>
#include <vector>

#include "cuda/allocator/history.h"
#include "cuda/allocator/settings.h"

namespace vt::cuda {

class StreamPool;

struct BlockInfo {
  uintptr_t address = 0;
  size_t size = 0;
  size_t requested_size = 0;
  BlockState state = BlockState::Free;
  AllocationContext context{};
};
/// torch's name of a block's state: "active_allocated", "active_pending_free", "inactive".
std::string_view block_state_name(BlockState state);

/// A plain segment, or one mapped range of an expandable one.
struct SegmentInfo {
  int device = 0;
  uintptr_t address = 0;
  size_t total_size = 0;
  size_t allocated_size = 0;  // handed out
  size_t active_size = 0;     // and pending
  size_t requested_size = 0;
  StreamHandle stream = nullptr;
  bool is_large = false;
  bool is_expandable = false;
  MempoolId pool{};
  AllocationContext context{};
  std::vector<BlockInfo> blocks{};
};

struct Snapshot {
  std::vector<SegmentInfo> segments{};  // by address
  std::vector<TraceEntry> trace{};      // oldest first
  AllocatorSettings settings{};
};

/// Appends what `pool`, whose lock is held, has.
void append_segments(const StreamPool& pool, std::vector<SegmentInfo>& out);

}  // namespace vt::cuda
