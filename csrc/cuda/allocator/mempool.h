// Names of pools, and which allocations go to one.
#pragma once

#include <compare>
#include <cstdint>
#include <thread>

#include "cuda/allocator/device_api.h"

namespace vt::cuda {

/// A pool's handle, a pair as in torch; {0, 0} is the default pool.
struct MempoolId {
  uint64_t first = 0;
  uint64_t second = 0;

  bool is_default() const { return first == 0 && second == 0; }
  friend auto operator<=>(const MempoolId&, const MempoolId&) = default;
};

/// A name that no pool of this process has: {n, 0} for a MemPool, {0, n} for a graph's pool. The
/// pool itself is made, on each device apart, by CachingAllocator::hold_pool.
MempoolId new_mempool_id(bool user);

/// Which allocations begin_allocate_to_pool sends to its pool: those of one thread or of any, on
/// one stream or on any.
struct AllocationRoute {
  bool any_thread = false;
  std::thread::id thread = std::this_thread::get_id();
  bool any_stream = true;
  StreamHandle stream = nullptr;

  /// Of the calling thread, on any stream.
  static AllocationRoute this_thread() { return {}; }
  /// Of any thread, on `stream`.
  static AllocationRoute on_stream(StreamHandle stream) {
    return {.any_thread = true, .thread = {}, .any_stream = false, .stream = stream};
  }
  /// Of the calling thread, on `stream`.
  static AllocationRoute this_thread_on_stream(StreamHandle stream) {
    return {.any_stream = false, .stream = stream};
  }

  bool matches(std::thread::id caller, StreamHandle on) const {
    return (any_thread || thread == caller) && (any_stream || stream == on);
  }
};

}  // namespace vt::cuda
