// The message of an out-of-memory error: what was asked, what the device has, who holds the rest.
#include <algorithm>
#include <cstdio>
#include <mutex>

#include "core/error.h"
#include "cuda/allocator/caching_allocator.h"

namespace vt::cuda {
namespace {

std::string bytes_text(size_t nbytes) {
  static constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(nbytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  char text[40];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text;
}

std::string row(const std::string& name, const std::string& stream, const std::string& allocated,
                const std::string& pending, const std::string& cached, const std::string& largest) {
  char text[200];
  std::snprintf(text, sizeof text, "\n  %-20s %-18s %12s %12s %12s %12s", name.c_str(),
                stream.c_str(), allocated.c_str(), pending.c_str(), cached.c_str(),
                largest.c_str());
  return text;
}

std::string pool_label(const PoolUsage& usage) {
  if (usage.pool.is_default()) return "default";
  return str("(", usage.pool.first, ", ", usage.pool.second, ")",
             usage.use_count == 0 ? " unused" : "");
}

constexpr size_t kMostRows = 16;

}  // namespace

std::string CachingAllocator::out_of_memory_report(size_t nbytes, const ApiStatus& status) {
  size_t free = 0, total = core_->total_memory;
  core_->device.memory_info(&free, &total);
  const auto allocated = static_cast<size_t>(core_->gauges.allocated_bytes());
  const auto pending = static_cast<size_t>(core_->gauges.pending_bytes());
  const size_t reserved = core_->claimed();
  const size_t limit = core_->limit.load();
  std::string out =
      str("CUDA out of memory. Tried to allocate ", bytes_text(nbytes),
          " on cuda:", core_->device_index, ", which has ", bytes_text(total), " of which ",
          bytes_text(free), " is free. ", bytes_text(allocated), " is allocated by vibetensor, ",
          bytes_text(pending), " waits for other streams, and ",
          bytes_text(reserved - std::min(reserved, allocated + pending)),
          " is reserved but not allocated.");
  if (limit != AllocatorSettings::kNoLimit) {
    out += str(" The memory limit is ", bytes_text(limit), ".");
  }
  if (status.message[0] != '\0') out += str(" Last refusal: ", status.message, ".");

  std::vector<PoolUsage> pools = usage();
  std::sort(pools.begin(), pools.end(),
            [](const PoolUsage& a, const PoolUsage& b) { return a.reserved > b.reserved; });
  if (!pools.empty()) {
    out += row("pool", "stream", "allocated", "pending", "cached", "largest free");
  }
  for (size_t i = 0; i < pools.size() && i < kMostRows; ++i) {
    char stream[24];
    std::snprintf(stream, sizeof stream, "%#zx", reinterpret_cast<size_t>(pools[i].stream));
    out += row(pool_label(pools[i]), pools[i].stream ? stream : "0", bytes_text(pools[i].allocated),
               bytes_text(pools[i].pending), bytes_text(pools[i].cached),
               bytes_text(pools[i].largest_free));
  }
  if (pools.size() > kMostRows) out += str("\n  and ", pools.size() - kMostRows, " more");

  out += "\nFree tensors, or use a smaller batch.";
  if (!core_->expandable && core_->settings.backend == Backend::Native &&
      reserved - std::min(reserved, allocated + pending) >= nbytes) {
    out += " The cached memory is in pieces: VT_CUDA_ALLOC=expandable_segments:true avoids that.";
  }
  return out;
}

void CachingAllocator::throw_out_of_memory(size_t nbytes, const ApiStatus& status,
                                           StreamHandle stream, AllocationContext context) {
  core_->ooms.fetch_add(1, std::memory_order_relaxed);
  size_t free = 0, total = 0;
  core_->device.memory_info(&free, &total);
  core_->history.record(TraceAction::Oom, free, nbytes, stream, {}, std::move(context));
  std::vector<OutOfMemoryObserver> observers;
  {
    const std::lock_guard lock(callback_mutex_);
    observers = observers_;
  }
  for (const auto& observer : observers) {
    observer({core_->device_index, nbytes, core_->total_memory, free});
  }
  fail(ErrorKind::OutOfMemory, out_of_memory_report(nbytes, status));
}

}  // namespace vt::cuda
