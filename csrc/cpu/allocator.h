// The CPU's caching allocator. Fresh pages cost more than the arithmetic done on them (a page
// fault every 4 KiB), so freed blocks are kept by size class and handed out again.
#pragma once

#include <cstdint>

namespace vt::cpu {

struct AllocatorStats {
  int64_t allocated = 0;  // bytes in live allocations
  int64_t cached = 0;     // bytes kept for reuse
  int64_t peak = 0;       // highest `allocated` since the last reset
};

AllocatorStats allocator_stats();
void reset_peak_stats();
/// Gives every cached block back to the system.
void empty_cache();

}  // namespace vt::cpu
