#include "cpu/allocator.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "core/allocator.h"
#include "core/block_cache.h"
#include "core/error.h"

namespace vt::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kTiny = 512;  // from the thread's own free list, no lock
constexpr size_t kSmallest = size_t{1} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kStepsPerDoubling = 4;  // at most 25% of a block is slack
constexpr int kClasses = 4 * 54;
constexpr size_t kCacheLimit = size_t{4} << 30;  // bytes kept for reuse before blocks go back

std::atomic<int64_t> allocated{0};
std::atomic<int64_t> peak{0};

void count_allocated(int64_t delta) {
  const int64_t now = allocated.fetch_add(delta, std::memory_order_relaxed) + delta;
  int64_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
}

/// Size class of a request and the bytes its blocks have: 4 evenly spaced steps per power of two.
struct SizeClass {
  int index;
  size_t bytes;
};
SizeClass size_class(size_t nbytes) {
  if (nbytes <= kSmallest) return {0, kSmallest};
  const int log2 = 63 - __builtin_clzll(nbytes - 1);
  const size_t step = (size_t{1} << log2) / kStepsPerDoubling;
  const size_t steps = (nbytes - (size_t{1} << log2) + step - 1) / step;
  return {(log2 - 10) * kStepsPerDoubling + static_cast<int>(steps),
          (size_t{1} << log2) + steps * step};
}

/// The bytes of a class's blocks.
size_t class_bytes(int index) {
  if (index == 0) return kSmallest;
  const size_t base = kSmallest << (index - 1) / kStepsPerDoubling;
  return base + base / kStepsPerDoubling * static_cast<size_t>((index - 1) % kStepsPerDoubling + 1);
}

/// Large blocks are mapped by themselves.
bool is_mapped(size_t bytes) { return bytes >= kHugePage; }

/// New memory for a block, null if there is none. Large blocks ask for huge pages: where the system
/// hands those out on request only, streaming through 4 KB pages is a quarter slower. Not from the
/// C library, whose large blocks may lie in memory that others used, which has its small pages.
void* new_block(size_t bytes) {
  if (!is_mapped(bytes)) return std::aligned_alloc(kAlignment, bytes);
  void* const map =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  const size_t before = -reinterpret_cast<uintptr_t>(map) % kHugePage;
  char* const block = static_cast<char*>(map) + before;
  if (before > 0) munmap(map, before);
  munmap(block + bytes, kHugePage - before);
  // The part that fills whole huge pages; a refusal leaves small ones, which serve too.
  madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return block;
}

void free_block(void* block, size_t bytes) noexcept {
  if (is_mapped(bytes))
    munmap(block, bytes);
  else
    std::free(block);
}

class BlockPool {
 public:
  void* take(SizeClass wanted) {
    {
      const std::lock_guard lock(mutex_);
      auto& list = free_[wanted.index];
      if (!list.empty()) {
        void* block = list.back();
        list.pop_back();
        cached_ -= wanted.bytes;
        return block;
      }
    }
    void* block = new_block(wanted.bytes);
    if (!block) {
      release_all();
      block = new_block(wanted.bytes);
    }
    return block;
  }

  void give(void* block, SizeClass wanted) noexcept {
    try {
      const std::lock_guard lock(mutex_);
      if (cached_ + wanted.bytes <= kCacheLimit) {
        free_[wanted.index].push_back(block);
        cached_ += wanted.bytes;
        return;
      }
    } catch (const std::bad_alloc&) {
      // No room to note the block: give it back instead.
    }
    free_block(block, wanted.bytes);
  }

  void release_all() {
    const std::lock_guard lock(mutex_);
    for (int index = 0; index < kClasses; ++index) {
      auto& list = free_[index];
      for (void* block : list) free_block(block, class_bytes(index));
      list.clear();
      list.shrink_to_fit();
    }
    cached_ = 0;
  }

  size_t cached() {
    const std::lock_guard lock(mutex_);
    return cached_;
  }

 private:
  std::mutex mutex_;
  std::vector<void*> free_[kClasses];
  size_t cached_ = 0;
};

BlockPool& pool() {
  // Never destroyed: tensors held by static objects may be freed after main returns.
  static auto* instance = new BlockPool;
  return *instance;
}

void release_tiny(void* context, void*, size_t nbytes) noexcept {
  count_allocated(-static_cast<int64_t>(nbytes));
  block_cache_release(context, nbytes + kAlignment);
}
void release_block(void*, void* data, size_t nbytes) noexcept {
  count_allocated(-static_cast<int64_t>(nbytes));
  pool().give(data, size_class(nbytes));
}

/// The machine's memory with its swap space: an operating system that overcommits grants more, and
/// kills the process that writes it.
size_t most_memory() {
  static const size_t bytes = [] {
    struct sysinfo machine;
    if (sysinfo(&machine) != 0) return size_t{1} << 62;
    return (static_cast<size_t>(machine.totalram) + machine.totalswap) * machine.mem_unit;
  }();
  return bytes;
}

class CpuAllocator final : public Allocator {
 public:
  Allocation allocate(size_t nbytes, Device) override {
    if (nbytes == 0) return {};
    if (nbytes + kAlignment <= kTiny) {
      void* raw = block_cache_allocate(nbytes + kAlignment);
      const auto address =
          (reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) & ~uintptr_t{kAlignment - 1};
      count_allocated(static_cast<int64_t>(nbytes));
      return {reinterpret_cast<void*>(address), nbytes, raw, release_tiny};
    }
    void* data = nbytes <= most_memory() ? pool().take(size_class(nbytes)) : nullptr;
    if (!data) {
      fail(ErrorKind::OutOfMemory, "CPU out of memory: tried to allocate ", nbytes, " bytes (",
           allocated.load(), " bytes are allocated). Free tensors, or use a smaller batch.");
    }
    count_allocated(static_cast<int64_t>(nbytes));
    return {data, nbytes, nullptr, release_block};
  }
};

const bool registered = [] {
  static auto* allocator = new CpuAllocator;
  set_allocator(DeviceType::CPU, allocator);
  return true;
}();

}  // namespace

AllocatorStats allocator_stats() {
  return {allocated.load(), static_cast<int64_t>(pool().cached()), peak.load()};
}
void reset_peak_stats() { peak.store(allocated.load()); }
void empty_cache() { pool().release_all(); }

}  // namespace vt::cpu
