// Counters with torch's names. Counts that grow only are kept by each pool under its lock; what
// has a peak over the whole device lives in DeviceGauges as relaxed atomics.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/allocator/block.h"

namespace vt::cuda {

struct Stat {
  int64_t current = 0;
  int64_t peak = 0;
  int64_t allocated = 0;  // sum of all increases
  int64_t freed = 0;      // sum of all decreases
};

/// Applies a change to a quantity counted under a lock.
inline void add_to(Stat& stat, int64_t change) {
  stat.current += change;
  stat.peak = std::max(stat.peak, stat.current);
  (change > 0 ? stat.allocated : stat.freed) += change > 0 ? change : -change;
}

/// Times of calls, in microseconds.
struct DurationStat {
  int64_t total = 0, max = 0, min = 0, count = 0;

  void add(int64_t us) {
    total += us;
    max = count == 0 ? us : std::max(max, us);
    min = count == 0 ? us : std::min(min, us);
    ++count;
  }
};

/// Of both kinds, of small blocks, of large blocks.
struct StatByKind {
  Stat all, small_pool, large_pool;
};

struct MemoryStats {
  StatByKind allocation;            // blocks handed out
  StatByKind segment;               // plain segments, or mapped pages of expandable ones
  StatByKind active;                // handed out, or waiting for other streams
  StatByKind inactive_split;        // free parts of segments that are partly in use
  StatByKind allocated_bytes;       // as `allocation`
  StatByKind reserved_bytes;        // as `segment`
  StatByKind active_bytes;          // as `active`
  StatByKind inactive_split_bytes;  // as `inactive_split`
  StatByKind requested_bytes;       // asked for, before rounding
  Stat oversize_allocations;        // above max_split_size
  Stat oversize_segments;
  int64_t num_alloc_retries = 0;  // allocations that had to free cached memory first
  int64_t num_ooms = 0;
  int64_t num_sync_all_streams = 0;
  int64_t num_device_alloc = 0;  // driver calls that got memory
  int64_t num_device_free = 0;
  int64_t max_split_size = -1;
};

using NamedCounts = std::vector<std::pair<std::string, int64_t>>;
/// Appends "NAME.current", ".peak", ".allocated" and ".freed".
void append(NamedCounts& out, const std::string& name, const Stat& stat);
/// "allocated_bytes.all.current" and so on, the keys of torch.cuda.memory_stats, sorted.
NamedCounts flatten(const MemoryStats& stats);

/// What one pool counts under its lock, by kind.
struct PoolCounters {
  struct PerKind {
    int64_t allocations = 0, frees = 0;
    int64_t allocated_bytes = 0, freed_bytes = 0;
    int64_t requested_allocated = 0, requested_freed = 0;
    int64_t split_frees = 0, split_freed_bytes = 0;  // left the inactive split state
  };
  std::array<PerKind, kKinds> kinds{};

  void add(const PoolCounters& other);
};

/// current and peak of one quantity; for slow paths.
class Gauge {
 public:
  void add(int64_t n) {
    raise(peak_, current_.fetch_add(n, std::memory_order_relaxed) + n);
    allocated_.fetch_add(n, std::memory_order_relaxed);
  }
  void subtract(int64_t n) {
    current_.fetch_sub(n, std::memory_order_relaxed);
    freed_.fetch_add(n, std::memory_order_relaxed);
  }
  void reset_peak() { peak_.store(current_.load()); }
  Stat read() const { return {current_.load(), peak_.load(), allocated_.load(), freed_.load()}; }

  static void raise(std::atomic<int64_t>& peak, int64_t value) {
    int64_t seen = peak.load(std::memory_order_relaxed);
    while (value > seen && !peak.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<int64_t> current_{0}, peak_{0}, allocated_{0}, freed_{0};
};

/// Live blocks and bytes of the device with exact peaks, at two atomic additions an allocation:
/// one word holds the count (low half) and the 512-byte units (high half).
class DeviceGauges {
 public:
  void on_allocate(BlockKind kind, size_t size, size_t requested) {
    const int k = static_cast<int>(kind);
    const uint64_t mine = live_[k].fetch_add(pack(size), std::memory_order_relaxed) + pack(size);
    const uint64_t all = mine + live_[1 - k].load(std::memory_order_relaxed);
    raise(allocation_peaks_[k], mine);
    raise(allocation_peaks_[2], all);
    const auto asked = static_cast<int64_t>(requested);
    const int64_t wanted = requested_[k].fetch_add(asked, std::memory_order_relaxed) + asked;
    Gauge::raise(requested_peaks_[k], wanted);
    Gauge::raise(requested_peaks_[2], wanted + requested_[1 - k].load(std::memory_order_relaxed));
    // With nothing pending, active is what is allocated, and its peak follows that one's.
    const uint64_t mine_pending = pending_[k].load(std::memory_order_relaxed);
    const uint64_t all_pending = mine_pending + pending_[1 - k].load(std::memory_order_relaxed);
    if (all_pending != 0) [[unlikely]] {
      raise(active_peaks_[k], mine + mine_pending);
      raise(active_peaks_[2], all + all_pending);
    }
  }
  void on_free(BlockKind kind, size_t size, size_t requested) {
    live_[static_cast<int>(kind)].fetch_sub(pack(size), std::memory_order_relaxed);
    requested_[static_cast<int>(kind)].fetch_sub(static_cast<int64_t>(requested),
                                                 std::memory_order_relaxed);
  }
  void on_pending(BlockKind kind, size_t size) {
    pending_[static_cast<int>(kind)].fetch_add(pack(size), std::memory_order_relaxed);
  }
  void on_pending_done(BlockKind kind, size_t size) {
    pending_[static_cast<int>(kind)].fetch_sub(pack(size), std::memory_order_relaxed);
  }

  int64_t allocated_bytes() const { return bytes_of(live_[0].load() + live_[1].load()); }
  int64_t pending_bytes() const { return bytes_of(pending_[0].load() + pending_[1].load()); }
  int64_t peak_allocated_bytes() const { return allocation_peaks_[2].bytes.load(); }

  void reset_peaks();
  /// Fills `current` and `peak` of what lives here.
  void read(MemoryStats& stats) const;

 private:
  struct Peaks {
    std::atomic<int64_t> count{0}, bytes{0};
  };
  static uint64_t pack(size_t size) {
    return (static_cast<uint64_t>(size / kBlockAlignment) << 32) | 1;
  }
  static int64_t count_of(uint64_t word) { return static_cast<int64_t>(word & 0xffffffffu); }
  static int64_t bytes_of(uint64_t word) {
    return static_cast<int64_t>(word >> 32) * static_cast<int64_t>(kBlockAlignment);
  }
  static void raise(Peaks& peaks, uint64_t word) {
    Gauge::raise(peaks.count, count_of(word));
    Gauge::raise(peaks.bytes, bytes_of(word));
  }

  std::array<std::atomic<uint64_t>, kKinds> live_{}, pending_{};
  std::array<std::atomic<int64_t>, kKinds> requested_{};
  // [2]: both kinds
  std::array<Peaks, kKinds + 1> allocation_peaks_{}, active_peaks_{};
  std::array<std::atomic<int64_t>, kKinds + 1> requested_peaks_{};
};

}  // namespace vt::cuda
