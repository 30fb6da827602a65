#include "cuda/allocator/pinned_allocator.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <mutex>
#include <optional>
#include <utility>

#include "core/error.h"
#include "core/host_wait.h"
#include "cuda/allocator/caching_allocator.h"
#include "cuda/allocator/core.h"

namespace vt::cuda {
namespace {

constexpr size_t kSmallest = 4096;
constexpr int kSteps = 4;
constexpr int kClasses = kSteps * 40;
constexpr size_t kLargestPinned = size_t{1} << 46;

struct SizeClass {
  int index;
  size_t nbytes;
};

SizeClass size_class(size_t nbytes) {
  if (nbytes <= kSmallest) return {0, kSmallest};
  const int log2 = 63 - std::countl_zero(static_cast<uint64_t>(nbytes - 1));
  const size_t floor = size_t{1} << log2;
  const size_t step = floor / kSteps;
  const size_t steps = (nbytes - floor + step - 1) / step;
  return {(log2 - 12) * kSteps + static_cast<int>(steps), floor + steps * step};
}

/// Microseconds that a driver call took.
template <class F>
int64_t timed(F&& call) {
  using namespace std::chrono;
  const auto start = steady_clock::now();
  call();
  return duration_cast<microseconds>(steady_clock::now() - start).count();
}

}  // namespace

struct PinnedAllocator::Impl {
  struct PinnedBlock final : Block {
    Impl* owner = nullptr;
  };

  Impl(DeviceApi& api, size_t limit) : device(api), cache_limit(limit), pending(api) {}

  DeviceApi& device;
  const size_t cache_limit;
  PoolLock lock;  // guards what follows; not held while the driver locks or unlocks pages
  bool closed = false;
  PendingFrees pending;
  std::array<Block*, kClasses> free{};
  std::vector<std::unique_ptr<PinnedBlock>> blocks;  // all, also those without memory
  Block* spares = nullptr;
  PinnedStats stats;

  Block* pop_free(int index) {
    Block* block = free[index];
    if (!block) return nullptr;
    free[index] = block->list_next;
    block->list_next = nullptr;
    stats.cached_bytes -= static_cast<int64_t>(block->size);
    return block;
  }
  void push_free(Block* block) {
    const int index = size_class(block->size).index;
    block->state = BlockState::Free;
    block->uses.clear();
    block->list_next = free[index];
    free[index] = block;
    stats.cached_bytes += static_cast<int64_t>(block->size);
  }
  void push_spare(Block* block) {
    block->state = BlockState::Spare;
    block->address = 0;
    block->size = 0;
    block->list_next = spares;
    spares = block;
  }
  Block* spare() {
    if (!spares) {
      blocks.reserve(blocks.size() + 1);
      auto fresh = std::make_unique<PinnedBlock>();
      fresh->owner = this;
      push_spare(fresh.get());
      blocks.push_back(std::move(fresh));
    }
    Block* block = spares;
    spares = block->list_next;
    block->list_next = nullptr;
    return block;
  }
  static Impl* of(Block* block) { return static_cast<PinnedBlock*>(block)->owner; }

  /// Waits for the copies that blocks wait for, with the lock let go of meanwhile.
  void wait_pending(std::unique_lock<PoolLock>& guard) noexcept {
    try {
      std::vector<PendingFrees::Wait> waits = pending.begin_wait(nullptr);
      if (!waits.empty()) {
        guard.unlock();
        PendingFrees::wait(waits);
        guard.lock();
        pending.end_wait(waits);
      }
    } catch (const std::bad_alloc&) {
    }
    process_pending();
  }

  void process_pending() noexcept {
    if (pending.empty()) return;
    std::vector<Block*> done;
    try {
      done.reserve(pending.count());
      pending.process(nullptr, done);
    } catch (const std::bad_alloc&) {
    }
    for (Block* block : done) {
      stats.pending_bytes -= static_cast<int64_t>(block->size);
      count_active(block, -1);
      push_free(block);
    }
  }

  void count_active(const Block* block, int sign) {
    add_to(stats.active_blocks, sign);
    add_to(stats.active_bytes, sign * static_cast<int64_t>(block->size));
  }
  void count_owned(const Block* block, int sign, int64_t us) {
    add_to(stats.owned_blocks, sign);
    add_to(stats.owned_bytes, sign * static_cast<int64_t>(block->size));
    ++(sign > 0 ? stats.num_host_alloc : stats.num_host_free);
    (sign > 0 ? stats.host_alloc_time : stats.host_free_time).add(us);
  }

  /// Unlinks one cached block, the largest first.
  Block* pop_any() {
    for (int i = kClasses; i-- > 0;) {
      if (Block* block = pop_free(i)) return block;
    }
    return nullptr;
  }

  size_t release_cached() noexcept {
    size_t released = 0;
    const HostWait waiting;  // the driver waits for the device before it unlocks pages
    std::unique_lock guard(lock);
    process_pending();
    while (Block* block = pop_any()) {
      guard.unlock();
      bool gone = false;
      const int64_t us =
          timed([&] { gone = device.free_host(reinterpret_cast<void*>(block->address)).gone(); });
      guard.lock();
      if (!gone) {
        push_free(block);
        break;
      }
      count_owned(block, -1, us);
      released += block->size;
      push_spare(block);
    }
    return released;
  }
};

PinnedAllocator::PinnedAllocator(DeviceApi& device, const AllocatorSettings& settings)
    : impl_(std::make_unique<Impl>(device, settings.pinned_cache_limit)) {}

PinnedAllocator::~PinnedAllocator() {
  bool alive = in_forked_child();
  if (!alive) {
    {
      std::unique_lock guard(impl_->lock);
      impl_->wait_pending(guard);
      impl_->closed = true;
    }
    // Twice: a driver call that failed once may work now.
    for (int turn = 0; turn < 2; ++turn) {
      impl_->release_cached();
      impl_->pending.destroy_events();
    }
    alive = impl_->stats.allocated_bytes > 0 || !impl_->pending.empty();
  }
  if (alive) keep_for_late_releases(std::move(impl_));
}

size_t PinnedAllocator::block_size(size_t nbytes) { return size_class(nbytes).nbytes; }

Allocation PinnedAllocator::allocate(size_t nbytes) {
  if (nbytes == 0) return {};
  if (in_forked_child()) {
    fail(
        "pinned memory cannot be allocated in a forked child process; start it with the 'spawn' "
        "or 'forkserver' method of multiprocessing");
  }
  Impl& impl = *impl_;
  ApiStatus status{ApiCode::OutOfMemory, 0, "the request is too large"};
  const SizeClass wanted = size_class(nbytes);
  for (int turn = 0; turn < 2 && nbytes <= kLargestPinned; ++turn) {
    std::unique_lock guard(impl.lock);
    Block* block = impl.pop_free(wanted.index);
    if (!block) {
      impl.process_pending();
      block = impl.pop_free(wanted.index);
    }
    std::optional<HostWait> waiting;
    if (!block) {
      block = impl.spare();
      guard.unlock();
      waiting.emplace();  // locking pages takes milliseconds, copies may take longer
      void* data = nullptr;
      const int64_t us = timed([&] { status = impl.device.allocate_host(wanted.nbytes, &data); });
      guard.lock();
      if (!status.ok()) {
        impl.push_spare(block);
        if (status.code == ApiCode::OutOfMemory) impl.wait_pending(guard);
        guard.unlock();  // before the HostWait ends
        if (status.code != ApiCode::OutOfMemory) break;
        impl.release_cached();
        continue;
      }
      block->address = reinterpret_cast<uintptr_t>(data);
      block->size = wanted.nbytes;
      impl.count_owned(block, 1, us);
    }
    block->state = BlockState::Allocated;
    block->requested = nbytes;
    impl.count_active(block, 1);
    impl.stats.allocated_bytes += static_cast<int64_t>(block->size);
    impl.stats.peak_allocated_bytes =
        std::max(impl.stats.peak_allocated_bytes, impl.stats.allocated_bytes);
    guard.unlock();  // before the HostWait ends
    return {reinterpret_cast<void*>(block->address), nbytes, block, &PinnedAllocator::release};
  }
  const PinnedStats now = stats();
  if (status.code == ApiCode::OutOfMemory) {
    fail(ErrorKind::OutOfMemory, "cannot allocate ", nbytes,
         " bytes of pinned host memory: ", status.message, " (", now.allocated_bytes,
         " bytes are allocated, ", now.pending_bytes,
         " wait for copies). Free pinned tensors, or pin fewer batches at a time.");
  }
  fail("cannot allocate ", nbytes, " bytes of pinned host memory: ",
       status.code == ApiCode::Dead ? "the CUDA context is gone" : status.message);
}

void PinnedAllocator::release(void* context, void*, size_t) noexcept {
  if (in_forked_child()) return;
  auto* block = static_cast<Block*>(context);
  Impl& impl = *Impl::of(block);
  std::unique_lock guard(impl.lock);
  if (impl.closed) return;
  impl.stats.allocated_bytes -= static_cast<int64_t>(block->size);
  if (!block->uses.empty()) {
    try {
      impl.pending.add(block);
      block->state = BlockState::Pending;
      impl.stats.pending_bytes += static_cast<int64_t>(block->size);
      return;
    } catch (const std::bad_alloc&) {
      for (const StreamUse& use : block->uses) use.device->synchronize_stream(use.stream);
    }
  }
  impl.count_active(block, -1);
  if (static_cast<size_t>(impl.stats.cached_bytes) + block->size > impl.cache_limit) {
    guard.unlock();
    const HostWait waiting;  // the driver waits for the device before it unlocks pages
    bool gone = false;
    const int64_t us = timed(
        [&] { gone = impl.device.free_host(reinterpret_cast<void*>(block->address)).gone(); });
    const std::lock_guard again(impl.lock);
    if (gone) {
      impl.count_owned(block, -1, us);
      block->uses.clear();
      impl.push_spare(block);
    } else {
      impl.push_free(block);
    }
    return;
  }
  impl.push_free(block);
}

void PinnedAllocator::record_stream(void* context, StreamHandle stream) {
  record_stream(context, stream, impl_->device);
}

void PinnedAllocator::record_stream(void* context, StreamHandle stream, DeviceApi& device) {
  if (!context || in_forked_child()) return;
  auto* block = static_cast<Block*>(context);
  const std::lock_guard guard(Impl::of(block)->lock);
  const StreamUse use = AllocatorCore::use_by(device, stream);
  if (std::find(block->uses.begin(), block->uses.end(), use) == block->uses.end()) {
    block->uses.push_back(use);
  }
}

void PinnedAllocator::process_pending() {
  if (in_forked_child()) return;
  const std::lock_guard guard(impl_->lock);
  impl_->process_pending();
}

size_t PinnedAllocator::empty_cache() { return in_forked_child() ? 0 : impl_->release_cached(); }

PinnedStats PinnedAllocator::stats() {
  const std::lock_guard guard(impl_->lock);
  return impl_->stats;
}

void PinnedAllocator::reset_peak_stats() {
  const std::lock_guard guard(impl_->lock);
  PinnedStats& stats = impl_->stats;
  stats.peak_allocated_bytes = stats.allocated_bytes;
  for (Stat* stat :
       {&stats.owned_blocks, &stats.owned_bytes, &stats.active_blocks, &stats.active_bytes}) {
    stat->peak = stat->current;
  }
}

void PinnedAllocator::reset_accumulated_stats() {
  const std::lock_guard guard(impl_->lock);
  PinnedStats& stats = impl_->stats;
  stats.num_host_alloc = stats.num_host_free = 0;
  stats.host_alloc_time = stats.host_free_time = {};
  for (Stat* stat :
       {&stats.owned_blocks, &stats.owned_bytes, &stats.active_blocks, &stats.active_bytes}) {
    stat->allocated = stat->freed = 0;
  }
}

NamedCounts flatten(const PinnedStats& stats) {
  NamedCounts out;
  const auto duration = [&](const std::string& name, const DurationStat& d) {
    out.emplace_back(name + ".total", d.total);
    out.emplace_back(name + ".max", d.max);
    out.emplace_back(name + ".min", d.min);
    out.emplace_back(name + ".count", d.count);
    out.emplace_back(name + ".avg", d.count ? d.total / d.count : 0);
  };
  append(out, "allocations", stats.owned_blocks);
  append(out, "allocated_bytes", stats.owned_bytes);
  append(out, "active_requests", stats.active_blocks);
  append(out, "active_bytes", stats.active_bytes);
  duration("host_alloc_time", stats.host_alloc_time);
  duration("host_free_time", stats.host_free_time);
  out.emplace_back("num_host_alloc", stats.num_host_alloc);
  out.emplace_back("num_host_free", stats.num_host_free);
  std::sort(out.begin(), out.end());
  return out;
}

std::string PinnedAllocator::check_invariants() {
  const std::lock_guard guard(impl_->lock);
  int64_t allocated = 0, pending = 0, cached = 0, listed = 0;
  for (const auto& block : impl_->blocks) {
    const auto size = static_cast<int64_t>(block->size);
    if (block->state == BlockState::Allocated) allocated += size;
    if (block->state == BlockState::Pending) pending += size;
    if (block->state == BlockState::Free) cached += size;
    if (block->state == BlockState::Spare && size != 0) return "a spare block has memory";
  }
  for (int i = 0; i < kClasses; ++i) {
    for (const Block* block = impl_->free[i]; block; block = block->list_next) {
      if (block->state != BlockState::Free) return "a listed block is not free";
      if (size_class(block->size).index != i) return "a block is in the wrong size class";
      listed += static_cast<int64_t>(block->size);
    }
  }
  if (allocated != impl_->stats.allocated_bytes) return "allocated bytes are wrong";
  if (pending != impl_->stats.pending_bytes) return "pending bytes are wrong";
  if (cached != impl_->stats.cached_bytes || cached != listed) return "cached bytes are wrong";
  return {};
}

}  // namespace vt::cuda
