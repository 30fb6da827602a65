// Page-locked host memory, cached by size class: the driver takes milliseconds to lock pages, so
// freed blocks are kept. A block that copies on some streams still read or write is reused once
// an event on each of them has passed.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "cuda/allocator/block.h"
#include "cuda/allocator/pending_frees.h"
#include "cuda/allocator/pool_lock.h"
#include "cuda/allocator/settings.h"
#include "cuda/allocator/stats.h"

namespace vt::cuda {

struct PinnedStats {
  int64_t allocated_bytes = 0;  // handed out, as blocks
  int64_t peak_allocated_bytes = 0;
  int64_t pending_bytes = 0;  // given back; copies still use them
  int64_t cached_bytes = 0;
  int64_t num_host_alloc = 0;  // driver calls
  int64_t num_host_free = 0;

  // torch's quantities. A block is owned from one driver call to the other, and active from when
  // it is handed out until it may be handed out again.
  Stat owned_blocks{}, owned_bytes{}, active_blocks{}, active_bytes{};
  DurationStat host_alloc_time{}, host_free_time{};
};
/// The keys of torch.cuda.host_memory_stats, sorted; times in microseconds.
NamedCounts flatten(const PinnedStats& stats);

class PinnedAllocator {
 public:
  /// `device` must outlive the allocator.
  PinnedAllocator(DeviceApi& device, const AllocatorSettings& settings);
  /// Waits for the copies and gives everything back. Allocations still alive keep their memory
  /// until the process ends, and may be released later without harm.
  ~PinnedAllocator();
  PinnedAllocator(const PinnedAllocator&) = delete;
  PinnedAllocator& operator=(const PinnedAllocator&) = delete;

  /// At least `nbytes`, aligned to 4096. Zero bytes: a null pointer. Throws OutOfMemory.
  Allocation allocate(size_t nbytes);
  /// Whether an allocation with this release function is one of ours, so that its `context` may be
  /// given to the functions below.
  static bool made(decltype(Allocation::release) release_function) {
    return release_function == &release;
  }
  /// Tells that a copy on `stream` uses the allocation (its `context`): once it is released its
  /// memory is not reused before that copy is done. Call after issuing the copy or before. The
  /// stream is one of `device`, which must outlive the allocator; without it, of the allocator's.
  void record_stream(void* context, StreamHandle stream, DeviceApi& device);
  void record_stream(void* context, StreamHandle stream);
  /// Makes memory free whose copies are done, where it was given back while they ran.
  void process_pending();
  /// Gives cached memory back; returns its bytes.
  size_t empty_cache();
  PinnedStats stats();
  void reset_peak_stats();
  void reset_accumulated_stats();
  /// What is inconsistent, for tests; empty when all is well.
  std::string check_invariants();

  /// The bytes of the block that serves a request: four steps between two powers of two.
  static size_t block_size(size_t nbytes);

 private:
  struct Impl;
  static void release(void* context, void* data, size_t nbytes) noexcept;

  std::unique_ptr<Impl> impl_;
};

}  // namespace vt::cuda
