// Blocks and segments. A segment is one range of device addresses; its blocks tile it. All of it
// belongs to one StreamPool and is guarded by that pool's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/allocator/device_api.h"

namespace vt::cuda {

inline constexpr size_t kBlockAlignment = 512;
inline constexpr size_t kSmallLimit = size_t{1} << 20;          // larger requests are "large"
inline constexpr size_t kSmallSegment = size_t{2} << 20;        // plain segment, and mapped page
inline constexpr size_t kLargeSegment = size_t{20} << 20;       // plain segment of requests …
inline constexpr size_t kLargeSegmentLimit = size_t{10} << 20;  // … below this
inline constexpr size_t kLargeRounding = size_t{2} << 20;       // larger plain segments
inline constexpr size_t kLargeRemainder = size_t{64} << 10;     // smallest split from a large block

constexpr size_t align_up(size_t value, size_t step) { return (value + step - 1) / step * step; }
constexpr size_t align_down(size_t value, size_t step) { return value / step * step; }

class StreamPool;
struct Segment;

/// Opaque to the allocator: where an allocation was made. Its deleter may run while a pool is
/// locked, so it must neither block nor call the allocator.
using AllocationContext = std::shared_ptr<void>;

enum class BlockKind : uint8_t { Small, Large };
inline constexpr int kKinds = 2;

enum class BlockState : uint8_t {
  Spare,      // not part of a segment
  Unmapped,   // addresses of an expandable segment without memory
  Free,       // in the free index; neighbours are not Free
  Quick,      // in a quick list: free, not yet merged with its neighbours
  Allocated,  // handed out
  Pending,    // given back; work on other streams may still use it
};

/// Work of another stream that a block's memory takes part in. The stream may be another device's:
/// handles alone do not tell, as every device's default stream has the same.
struct StreamUse {
  DeviceApi* device = nullptr;  // of the stream
  StreamHandle stream = nullptr;
  uint64_t capture = 0;  // the stream's capture when it was told of; 0: eager work
  friend bool operator==(const StreamUse&, const StreamUse&) = default;
};

struct Block {
  uintptr_t address = 0;
  size_t size = 0;
  size_t requested = 0;
  StreamPool* pool = nullptr;
  BlockState state = BlockState::Spare;
  BlockKind kind = BlockKind::Small;
  uint32_t outstanding = 0;  // events that a Pending block waits for
  Block* list_next = nullptr;
  Block* list_prev = nullptr;
  Block* prev = nullptr;  // neighbours by address
  Block* next = nullptr;
  Segment* segment = nullptr;
  uint64_t freed_at = 0;          // the pool's clock, for garbage collection
  std::vector<StreamUse> uses{};  // from record_stream
  AllocationContext context{};

  uintptr_t end() const { return address + size; }
  /// Part of a segment that other blocks share.
  bool is_split() const { return prev != nullptr || next != nullptr; }
};

struct Segment {
  StreamPool* pool = nullptr;
  BlockKind kind = BlockKind::Small;
  bool expandable = false;
  uintptr_t address = 0;
  size_t size = 0;    // of the range
  size_t mapped = 0;  // bytes with memory behind them
  Block* first = nullptr;
  AllocationContext context{};

  // Expandable only: the handle behind each page (0: none), and the Unmapped blocks by address.
  size_t page = 0;
  std::vector<PhysicalHandle> pages{};
  std::vector<Block*> unmapped{};
  size_t stuck = 0;  // pages mapped behind Unmapped blocks, as the driver refused to unmap them
};

}  // namespace vt::cuda
