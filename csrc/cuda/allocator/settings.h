// Settings of the allocators, as VT_CUDA_ALLOC spells them: "name:value,name:value".
// docs/allocator.md lists them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace vt::cuda {

enum class Backend : uint8_t {
  Native,  // the caching allocator
  Async,   // the driver's stream-ordered pool
};

struct AllocatorSettings {
  static constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();
  /// One entry a power of two from 1 MiB (and below) to 64 GiB (and above).
  static constexpr int kRoundupClasses = 17;

  Backend backend = Backend::Native;
  /// Segments over virtual memory that grow in place. Ignored where the device has none.
  bool expandable_segments = true;
  /// Bytes that such a segment of large blocks maps and unmaps at a time. Smaller pages leave less
  /// memory stranded beside live blocks and take more driver calls to grow.
  size_t expandable_page = size_t{8} << 20;
  /// Blocks above it are never split, and serve only requests above it.
  size_t max_split_size = kNoLimit;
  /// Share of the memory limit above which idle cached blocks are given back; 0: never.
  double garbage_collection_threshold = 0;
  /// Steps between two powers of two that sizes are rounded up to, by size; 0 or 1: no rounding.
  std::array<uint32_t, kRoundupClasses> roundup_power2_divisions{};
  double memory_fraction = 1;      // of the device's memory
  size_t memory_limit = kNoLimit;  // bytes that the allocator may hold
  /// Freed page-locked memory kept for reuse.
  size_t pinned_cache_limit = kNoLimit;

  bool rounds_up() const;
  /// Bytes of the block that serves a request, before it is split from a segment.
  size_t block_size(size_t nbytes) const;
};

/// Throws Value naming the setting that is unknown, malformed or out of range.
AllocatorSettings parse_settings(std::string_view text);
/// What VT_CUDA_ALLOC says; the defaults when it is unset.
AllocatorSettings settings_from_environment();
/// The same settings in the form parse_settings reads.
std::string format_settings(const AllocatorSettings& settings);

}  // namespace vt::cuda
