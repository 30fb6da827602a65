// What the pools of one device share: the device, the settings, the memory limit, the counters.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/allocator/device_api.h"
#include "cuda/allocator/history.h"
#include "cuda/allocator/settings.h"
#include "cuda/allocator/stats.h"

namespace vt::cuda {

/// Keeps the state of an allocator that is gone while its memory is still in use, for releases that
/// come later; until the process ends.
void keep_for_late_releases(std::shared_ptr<void> state);

struct KindGauges {
  Gauge all;
  std::array<Gauge, kKinds> kinds;

  void add(BlockKind kind, int64_t n) {
    kinds[static_cast<int>(kind)].add(n);
    all.add(n);
  }
  void subtract(BlockKind kind, int64_t n) {
    kinds[static_cast<int>(kind)].subtract(n);
    all.subtract(n);
  }
  void reset_peak() {
    all.reset_peak();
    for (Gauge& gauge : kinds) gauge.reset_peak();
  }
  StatByKind read() const { return {all.read(), kinds[0].read(), kinds[1].read()}; }
};

struct AllocatorCore {
  AllocatorCore(DeviceApi& api, int index, const AllocatorSettings& s)
      : device(api), device_index(index), settings(s) {}

  DeviceApi& device;
  const int device_index;
  const AllocatorSettings settings;
  bool expandable = false;
  bool rounds_up = false;
  size_t granularity = 0;
  size_t total_memory = 0;

  History history;
  DeviceGauges gauges;
  KindGauges segments, reserved_bytes;
  Gauge oversize_allocations, oversize_segments;
  std::atomic<int64_t> alloc_retries{0}, ooms{0}, sync_all_streams{0};
  std::atomic<int64_t> device_allocs{0}, device_frees{0};
  std::atomic<size_t> limit{AllocatorSettings::kNoLimit};

  /// Claims `nbytes` of the memory limit; false when they would exceed it.
  bool claim(size_t nbytes) {
    size_t now = claimed_.load(std::memory_order_relaxed);
    do {
      const size_t most = limit.load(std::memory_order_relaxed);
      if (now > most || nbytes > most - now) return false;
    } while (!claimed_.compare_exchange_weak(now, now + nbytes, std::memory_order_relaxed));
    return true;
  }
  void unclaim(size_t nbytes) { claimed_.fetch_sub(nbytes, std::memory_order_relaxed); }
  size_t claimed() const { return claimed_.load(std::memory_order_relaxed); }

  size_t page_size(BlockKind kind) const {
    return align_up(kind == BlockKind::Small ? kSmallSegment : settings.expandable_page,
                    granularity);
  }

  /// The use by work that `stream` of `device` has just been given or is about to be.
  static StreamUse use_by(DeviceApi& device, StreamHandle stream) {
    uint64_t capture = 0;
    if (!device.capture_id(stream, &capture).ok()) capture = 0;
    return {&device, stream, capture};
  }

  /// Handles and ranges that the driver refused to take back; tried again whenever memory is given
  /// back to the driver.
  void add_orphan(PhysicalHandle handle) noexcept {
    const std::lock_guard lock(orphans_mutex_);
    try {
      orphan_handles_.push_back(handle);
    } catch (const std::bad_alloc&) {
    }
  }
  void add_orphan(uintptr_t range, size_t nbytes) noexcept {
    const std::lock_guard lock(orphans_mutex_);
    try {
      orphan_ranges_.emplace_back(range, nbytes);
    } catch (const std::bad_alloc&) {
    }
  }
  /// Memory of backend:async whose free failed, or could not be ordered after work of `uses`.
  void add_orphan(uintptr_t address, StreamHandle stream, std::vector<StreamUse> uses) noexcept {
    const std::lock_guard lock(orphans_mutex_);
    try {
      orphan_frees_.push_back({address, stream, std::move(uses)});
    } catch (const std::bad_alloc&) {
    }
  }
  void retry_orphans() noexcept {
    const std::lock_guard lock(orphans_mutex_);
    std::erase_if(orphan_handles_,
                  [&](PhysicalHandle handle) { return device.release_physical(handle).gone(); });
    std::erase_if(orphan_ranges_, [&](const std::pair<uintptr_t, size_t>& range) {
      return device.free_range(range.first, range.second).gone();
    });
    std::erase_if(orphan_frees_, [&](const OrphanFree& orphan) {
      for (const StreamUse& use : orphan.uses) {
        uint64_t capture = 0;
        if (!use.device->capture_id(use.stream, &capture).gone() || capture != 0) return false;
        if (!use.device->synchronize_stream(use.stream).gone()) return false;
      }
      return device.free_async(orphan.address, orphan.stream).gone();
    });
  }

 private:
  struct OrphanFree {
    uintptr_t address;
    StreamHandle stream;
    std::vector<StreamUse> uses;
  };

  std::atomic<size_t> claimed_{0};
  std::mutex orphans_mutex_;
  std::vector<PhysicalHandle> orphan_handles_;
  std::vector<std::pair<uintptr_t, size_t>> orphan_ranges_;
  std::vector<OrphanFree> orphan_frees_;
};

}  // namespace vt::cuda
