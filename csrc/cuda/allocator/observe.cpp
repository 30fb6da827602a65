// What the allocator shows: statistics, usage by pool, snapshots.
#include <algorithm>
#include <mutex>

#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {
namespace {

constexpr StatByKind MemoryStats::* kByKind[] = {
    &MemoryStats::allocation,      &MemoryStats::segment,
    &MemoryStats::active,          &MemoryStats::inactive_split,
    &MemoryStats::allocated_bytes, &MemoryStats::reserved_bytes,
    &MemoryStats::active_bytes,    &MemoryStats::inactive_split_bytes,
    &MemoryStats::requested_bytes};
constexpr Stat StatByKind::* kKindMembers[] = {&StatByKind::small_pool, &StatByKind::large_pool,
                                               &StatByKind::all};
constexpr int64_t MemoryStats::* kCounts[] = {
    &MemoryStats::num_alloc_retries, &MemoryStats::num_ooms, &MemoryStats::num_sync_all_streams,
    &MemoryStats::num_device_alloc, &MemoryStats::num_device_free};

struct InactiveSplit {
  int64_t count[kKinds] = {}, bytes[kKinds] = {};
};

void add_inactive_split(const StreamPool& pool, InactiveSplit& out) {
  for (const auto& segment : pool.segments()) {
    for (const Block* block = segment->first; block; block = block->next) {
      if (!block->is_split()) continue;
      if (block->state != BlockState::Free && block->state != BlockState::Quick) continue;
      const int k = static_cast<int>(block->kind);
      ++out.count[k];
      out.bytes[k] += static_cast<int64_t>(block->size);
    }
  }
}

}  // namespace

MemoryStats CachingAllocator::stats() {
  MemoryStats stats;
  InactiveSplit inactive;
  PoolCounters counters;
  {
    const std::lock_guard lock(pools_mutex_);
    counters = retired_counters_;
    for (const auto& [key, pool] : pool_by_key_) {
      const std::lock_guard pool_lock(pool->lock);
      counters.add(pool->counters);
      add_inactive_split(*pool, inactive);
    }
  }
  core_->gauges.read(stats);
  stats.segment = core_->segments.read();
  stats.reserved_bytes = core_->reserved_bytes.read();
  stats.oversize_allocations = core_->oversize_allocations.read();
  stats.oversize_segments = core_->oversize_segments.read();
  stats.num_alloc_retries = core_->alloc_retries.load();
  stats.num_ooms = core_->ooms.load();
  stats.num_sync_all_streams = core_->sync_all_streams.load();
  stats.num_device_alloc = core_->device_allocs.load();
  stats.num_device_free = core_->device_frees.load();
  if (core_->settings.max_split_size != AllocatorSettings::kNoLimit) {
    stats.max_split_size = static_cast<int64_t>(core_->settings.max_split_size);
  }

  const std::lock_guard lock(stats_mutex_);
  for (int k = 0; k <= kKinds; ++k) {
    PoolCounters::PerKind sum;
    int64_t count = 0, bytes = 0;
    for (int i = 0; i < kKinds; ++i) {
      if (k < kKinds && i != k) continue;
      const PoolCounters::PerKind& c = counters.kinds[i];
      sum.allocations += c.allocations;
      sum.frees += c.frees;
      sum.allocated_bytes += c.allocated_bytes;
      sum.freed_bytes += c.freed_bytes;
      sum.requested_allocated += c.requested_allocated;
      sum.requested_freed += c.requested_freed;
      sum.split_frees += c.split_frees;
      sum.split_freed_bytes += c.split_freed_bytes;
      count += inactive.count[i];
      bytes += inactive.bytes[i];
    }
    const auto member = kKindMembers[k];
    const auto fill = [&](StatByKind& stat, int64_t allocated, int64_t freed) {
      (stat.*member).allocated = allocated;
      (stat.*member).freed = freed;
    };
    fill(stats.allocation, sum.allocations, sum.frees);
    fill(stats.allocated_bytes, sum.allocated_bytes, sum.freed_bytes);
    fill(stats.requested_bytes, sum.requested_allocated, sum.requested_freed);
    // A pending block is active until its events have passed.
    const Stat& active = stats.active.*member;
    fill(stats.active, sum.allocations, sum.allocations - active.current);
    const Stat& active_bytes = stats.active_bytes.*member;
    fill(stats.active_bytes, sum.allocated_bytes, sum.allocated_bytes - active_bytes.current);
    inactive_peaks_[k] = std::max(inactive_peaks_[k], count);
    inactive_byte_peaks_[k] = std::max(inactive_byte_peaks_[k], bytes);
    stats.inactive_split.*
        member = {count, inactive_peaks_[k], count + sum.split_frees, sum.split_frees};
    stats.inactive_split_bytes.*member = {bytes, inactive_byte_peaks_[k],
                                          bytes + sum.split_freed_bytes, sum.split_freed_bytes};
  }
  for (const auto by_kind : kByKind) {
    for (const auto member : kKindMembers) {
      (stats.*by_kind.*member).allocated -= (baseline_.*by_kind.*member).allocated;
      (stats.*by_kind.*member).freed -= (baseline_.*by_kind.*member).freed;
    }
  }
  stats.oversize_allocations.allocated -= baseline_.oversize_allocations.allocated;
  stats.oversize_allocations.freed -= baseline_.oversize_allocations.freed;
  stats.oversize_segments.allocated -= baseline_.oversize_segments.allocated;
  stats.oversize_segments.freed -= baseline_.oversize_segments.freed;
  for (const auto count : kCounts) stats.*count -= baseline_.*count;
  return stats;
}

void CachingAllocator::reset_peak_stats() {
  core_->gauges.reset_peaks();
  core_->segments.reset_peak();
  core_->reserved_bytes.reset_peak();
  core_->oversize_allocations.reset_peak();
  core_->oversize_segments.reset_peak();
  const std::lock_guard lock(stats_mutex_);
  inactive_peaks_ = {};
  inactive_byte_peaks_ = {};
}

void CachingAllocator::reset_accumulated_stats() {
  const MemoryStats now = stats();
  const std::lock_guard lock(stats_mutex_);
  for (const auto by_kind : kByKind) {
    for (const auto member : kKindMembers) {
      (baseline_.*by_kind.*member).allocated += (now.*by_kind.*member).allocated;
      (baseline_.*by_kind.*member).freed += (now.*by_kind.*member).freed;
    }
  }
  baseline_.oversize_allocations.allocated += now.oversize_allocations.allocated;
  baseline_.oversize_allocations.freed += now.oversize_allocations.freed;
  baseline_.oversize_segments.allocated += now.oversize_segments.allocated;
  baseline_.oversize_segments.freed += now.oversize_segments.freed;
  for (const auto count : kCounts) baseline_.*count += now.*count;
}

std::vector<PoolUsage> CachingAllocator::usage() {
  std::vector<PoolUsage> out;
  const std::lock_guard lock(pools_mutex_);
  out.reserve(pool_by_key_.size());
  for (const auto& [key, pool] : pool_by_key_) {
    PoolUsage& usage = out.emplace_back();
    usage.pool = key.first;
    usage.stream = key.second;
    const auto held = private_pools_.find(key.first);
    usage.use_count = held == private_pools_.end() ? 0 : held->second.use_count;
    const std::lock_guard pool_lock(pool->lock);
    for (const PoolCounters::PerKind& counter : pool->counters.kinds) {
      usage.allocated += static_cast<size_t>(counter.allocated_bytes - counter.freed_bytes);
    }
    usage.cached = pool->cached_bytes();
    const bool segmented = core_->settings.backend == Backend::Native;
    usage.reserved = segmented ? pool->mapped_bytes() : usage.allocated;
    usage.pending = usage.reserved - usage.allocated - usage.cached;
    usage.largest_free = pool->largest_free();
    usage.blocks = pool->live_blocks;
  }
  return out;
}

Snapshot CachingAllocator::snapshot(bool with_trace) {
  Snapshot out;
  out.settings = core_->settings;
  {
    const std::lock_guard lock(pools_mutex_);
    for (const auto& [key, pool] : pool_by_key_) {
      const std::lock_guard pool_lock(pool->lock);
      append_segments(*pool, out.segments);
    }
  }
  std::sort(out.segments.begin(), out.segments.end(),
            [](const SegmentInfo& a, const SegmentInfo& b) { return a.address < b.address; });
  if (with_trace) {
    core_->history.record(TraceAction::Snapshot, 0, 0, nullptr, {}, nullptr);
    out.trace = core_->history.entries();
  }
  return out;
}

}  // namespace vt::cuda
