#include "cuda/allocator/stats.h"

#include <algorithm>

namespace vt::cuda {

void append(NamedCounts& out, const std::string& name, const Stat& stat) {
  out.emplace_back(name + ".current", stat.current);
  out.emplace_back(name + ".peak", stat.peak);
  out.emplace_back(name + ".allocated", stat.allocated);
  out.emplace_back(name + ".freed", stat.freed);
}

NamedCounts flatten(const MemoryStats& stats) {
  NamedCounts out;
  const auto stat = [&](const std::string& name, const Stat& s) { append(out, name, s); };
  const auto by_kind = [&](const std::string& name, const StatByKind& s) {
    stat(name + ".all", s.all);
    stat(name + ".small_pool", s.small_pool);
    stat(name + ".large_pool", s.large_pool);
  };
  by_kind("allocation", stats.allocation);
  by_kind("segment", stats.segment);
  by_kind("active", stats.active);
  by_kind("inactive_split", stats.inactive_split);
  by_kind("allocated_bytes", stats.allocated_bytes);
  by_kind("reserved_bytes", stats.reserved_bytes);
  by_kind("active_bytes", stats.active_bytes);
  by_kind("inactive_split_bytes", stats.inactive_split_bytes);
  by_kind("requested_bytes", stats.requested_bytes);
  stat("oversize_allocations", stats.oversize_allocations);
  stat("oversize_segments", stats.oversize_segments);
  out.emplace_back("num_alloc_retries", stats.num_alloc_retries);
  out.emplace_back("num_ooms", stats.num_ooms);
  out.emplace_back("num_sync_all_streams", stats.num_sync_all_streams);
  out.emplace_back("num_device_alloc", stats.num_device_alloc);
  out.emplace_back("num_device_free", stats.num_device_free);
  out.emplace_back("max_split_size", stats.max_split_size);
  std::sort(out.begin(), out.end());
  return out;
}

void PoolCounters::add(const PoolCounters& other) {
  for (int k = 0; k < kKinds; ++k) {
    kinds[k].allocations += other.kinds[k].allocations;
    kinds[k].frees += other.kinds[k].frees;
    kinds[k].allocated_bytes += other.kinds[k].allocated_bytes;
    kinds[k].freed_bytes += other.kinds[k].freed_bytes;
    kinds[k].requested_allocated += other.kinds[k].requested_allocated;
    kinds[k].requested_freed += other.kinds[k].requested_freed;
    kinds[k].split_frees += other.kinds[k].split_frees;
    kinds[k].split_freed_bytes += other.kinds[k].split_freed_bytes;
  }
}

void DeviceGauges::reset_peaks() {
  uint64_t live[kKinds + 1], active[kKinds + 1];
  int64_t requested[kKinds + 1];
  for (int k = 0; k < kKinds; ++k) {
    live[k] = live_[k].load();
    active[k] = live[k] + pending_[k].load();
    requested[k] = requested_[k].load();
  }
  live[2] = live[0] + live[1];
  active[2] = active[0] + active[1];
  requested[2] = requested[0] + requested[1];
  for (int k = 0; k <= kKinds; ++k) {
    allocation_peaks_[k].count.store(count_of(live[k]));
    allocation_peaks_[k].bytes.store(bytes_of(live[k]));
    active_peaks_[k].count.store(count_of(active[k]));
    active_peaks_[k].bytes.store(bytes_of(active[k]));
    requested_peaks_[k].store(requested[k]);
  }
}

void DeviceGauges::read(MemoryStats& stats) const {
  const auto fill = [&](int k, uint64_t live, uint64_t pending, int64_t requested, auto member) {
    Stat& allocation = stats.allocation.*member;
    Stat& bytes = stats.allocated_bytes.*member;
    Stat& active = stats.active.*member;
    Stat& active_bytes = stats.active_bytes.*member;
    Stat& wanted = stats.requested_bytes.*member;
    allocation.current = count_of(live);
    allocation.peak = allocation_peaks_[k].count.load();
    bytes.current = bytes_of(live);
    bytes.peak = allocation_peaks_[k].bytes.load();
    active.current = count_of(live + pending);
    active.peak = std::max(active_peaks_[k].count.load(), allocation.peak);
    active_bytes.current = bytes_of(live + pending);
    active_bytes.peak = std::max(active_peaks_[k].bytes.load(), bytes.peak);
    wanted.current = requested;
    wanted.peak = requested_peaks_[k].load();
  };
  const uint64_t live[] = {live_[0].load(), live_[1].load()};
  const uint64_t pending[] = {pending_[0].load(), pending_[1].load()};
  const int64_t requested[] = {requested_[0].load(), requested_[1].load()};
  fill(0, live[0], pending[0], requested[0], &StatByKind::small_pool);
  fill(1, live[1], pending[1], requested[1], &StatByKind::large_pool);
  fill(2, live[0] + live[1], pending[0] + pending[1], requested[0] + requested[1],
       &StatByKind::all);
}

}  // namespace vt::cuda
