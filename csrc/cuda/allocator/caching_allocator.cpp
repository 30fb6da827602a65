#include "cuda/allocator/caching_allocator.h"

#include <pthread.h>

#include <algorithm>

#include <mutex>

#include "core/error.h"

namespace vt::cuda {
namespace {

constexpr size_t kLargestRequest = size_t{1} << 46;

std::atomic<bool> forked{false};

void watch_for_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
}

/// Where the thread's last allocations on a stream went. An epoch belongs to one allocator and
/// one set of routes, so that a stale entry is never taken for a fresh one.
struct RouteEntry {
  StreamHandle stream = nullptr;
  uint64_t epoch = 0;
  StreamPool* pool = nullptr;
  uint64_t serial = 0;
};
constexpr size_t kRouteEntries = 8;
thread_local constinit RouteEntry route_cache[kRouteEntries];

size_t route_slot(StreamHandle stream, uint64_t epoch) {
  const auto bits = reinterpret_cast<uintptr_t>(stream);
  return (bits ^ (bits >> 4) ^ (bits >> 8) ^ epoch) % kRouteEntries;
}

std::atomic<uint64_t> last_epoch{0};
std::atomic<uint64_t> last_serial{0};

}  // namespace

void keep_for_late_releases(std::shared_ptr<void> state) {
  static std::mutex mutex;
  // Never destroyed: objects with static storage may release after it.
  static auto* kept = new std::vector<std::shared_ptr<void>>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(state));
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

CachingAllocator::CachingAllocator(DeviceApi& device, int device_index,
                                   const AllocatorSettings& settings)
    : core_(std::make_unique<AllocatorCore>(device, device_index, settings)) {
  watch_for_fork();
  size_t free = 0;
  const ApiStatus status = device.memory_info(&free, &core_->total_memory);
  check(status.ok(), "cuda:", device_index, ": the memory size cannot be read: ", status.message);
  core_->expandable = settings.expandable_segments && device.supports_virtual_memory();
  core_->rounds_up = settings.rounds_up();
  core_->granularity = std::max(device.granularity(), kBlockAlignment);
  check(settings.backend != Backend::Async || device.supports_async_allocation(),
        "VT_CUDA_ALLOC: backend:async is not supported by cuda:", device_index,
        "; use backend:native");
  fraction_ = settings.memory_fraction;
  absolute_limit_ = settings.memory_limit;
  apply_limits();
  next_epoch();
}

CachingAllocator::~CachingAllocator() {
  next_epoch();
  bool alive = in_forked_child();  // the parent's memory is not ours to give back
  if (!alive) {
    for (const auto& pool : all_pools_) {
      std::unique_lock lock(pool->lock);
      const bool used = pool->serial != 0;
      pool->wait_pending(lock);
      pool->serial = 0;  // late releases find this and do nothing
      // Twice: a driver call that failed once may work now.
      for (int turn = 0; turn < 2; ++turn) {
        pool->pending.destroy_events();
        core_->retry_orphans();
        const uint64_t mark = used ? pool->mark_cached() : 0;
        if (mark != 0 && core_->device.synchronize_stream(pool->stream()).gone())
          pool->release_cached(SIZE_MAX, mark);
      }
      alive = alive || pool->live_blocks > 0 || pool->has_memory();
    }
    core_->retry_orphans();
  }
  if (alive) {
    for (auto& pool : all_pools_) keep_for_late_releases(std::move(pool));
    keep_for_late_releases(std::move(core_));
  }
}

void CachingAllocator::next_epoch() { epoch_.store(++last_epoch, std::memory_order_release); }

size_t CachingAllocator::block_size_of(size_t nbytes) const {
  if (core_->rounds_up) [[unlikely]]
    return core_->settings.block_size(nbytes);
  return align_up(nbytes, kBlockAlignment);
}

CachingAllocator::Resolved CachingAllocator::route(StreamHandle stream) {
  const uint64_t epoch = epoch_.load(std::memory_order_acquire);
  RouteEntry& entry = route_cache[route_slot(stream, epoch)];
  if (entry.epoch == epoch && entry.stream == stream) [[likely]]
    return {entry.pool, entry.serial};
  uint64_t found_at = 0;
  const Resolved found = find_pool(stream, &found_at);
  entry = {stream, found_at, found.pool, found.serial};
  return found;
}

CachingAllocator::Resolved CachingAllocator::find_pool(StreamHandle stream, uint64_t* epoch) {
  const std::lock_guard lock(pools_mutex_);
  *epoch = epoch_.load(std::memory_order_relaxed);
  MempoolId id;
  const std::thread::id self = std::this_thread::get_id();
  for (size_t i = routes_.size(); i-- > 0;) {
    if (routes_[i].route.matches(self, stream)) {
      id = routes_[i].pool;
      break;
    }
  }
  if (const auto known = pool_by_key_.find({id, stream}); known != pool_by_key_.end()) {
    return {known->second, known->second->serial};
  }
  const uint64_t serial = ++last_serial;
  StreamPool* pool = nullptr;
  if (!retired_.empty()) {
    pool_by_key_.emplace(PoolKey{id, stream}, retired_.back());
    pool = retired_.back();
    retired_.pop_back();
    const std::lock_guard pool_lock(pool->lock);
    pool->reset(id, stream, serial);
  } else {
    all_pools_.reserve(all_pools_.size() + 1);
    retired_.reserve(all_pools_.size() + 1);
    auto fresh = std::make_unique<StreamPool>(*core_, id, stream, serial);
    pool = fresh.get();
    pool_by_key_.emplace(PoolKey{id, stream}, pool);
    all_pools_.push_back(std::move(fresh));
  }
  return {pool, serial};
}

Allocation CachingAllocator::allocate(size_t nbytes, StreamHandle stream) {
  if (nbytes == 0) return {};
  if (in_forked_child()) [[unlikely]] {
    fail(
        "CUDA memory cannot be allocated in a forked child process; start it with the 'spawn' or "
        "'forkserver' method of multiprocessing");
  }
  AllocationContext context;
  const bool recorded = core_->history.on();
  if (recorded) [[unlikely]]
    context = core_->history.capture_context();
  if (nbytes > kLargestRequest) [[unlikely]] {
    throw_out_of_memory(nbytes, {ApiCode::OutOfMemory}, stream, std::move(context));
  }
  const size_t size = block_size_of(nbytes);
  if (core_->settings.backend == Backend::Async) [[unlikely]] {
    return allocate_async(nbytes, size, stream, std::move(context));
  }
  const BlockKind kind = size <= kSmallLimit ? BlockKind::Small : BlockKind::Large;
  const Resolved target = route(stream);
  Block* block = nullptr;
  {
    const std::lock_guard lock(target.pool->lock);
    if (target.pool->serial == target.serial) [[likely]]
      block = target.pool->take(kind, size, nbytes);
    if (recorded && block) [[unlikely]] {
      block->context = context;
      core_->history.record(TraceAction::Alloc, block->address, block->size, stream,
                            target.pool->id(), std::move(context));
    }
  }
  if (!block) [[unlikely]]
    return allocate_slowly(nbytes, size, stream, std::move(context));
  return hand_over(block, nbytes);
}

Allocation CachingAllocator::hand_over(Block* block, size_t nbytes) {
  if (block->size > core_->settings.max_split_size) [[unlikely]]
    core_->oversize_allocations.add(1);
  return {reinterpret_cast<void*>(block->address), nbytes, block, &CachingAllocator::release};
}

void CachingAllocator::release(void* context, void*, size_t) noexcept {
  auto* block = static_cast<Block*>(context);
  StreamPool* pool = block->pool;
  if (in_forked_child()) [[unlikely]]
    return;
  AllocatorCore& core = pool->core();
  AllocationContext freed_by;
  if (core.history.on()) [[unlikely]]
    freed_by = core.history.capture_free_context();
  const std::lock_guard lock(pool->lock);
  if (pool->serial == 0) [[unlikely]]
    return;  // the allocator is gone
  if (block->size > core.settings.max_split_size) [[unlikely]]
    core.oversize_allocations.subtract(1);
  if (core.history.on()) [[unlikely]] {
    if (!freed_by) freed_by = block->context;
    core.history.record(TraceAction::FreeRequested, block->address, block->size, pool->stream(),
                        pool->id(), freed_by);
    // With backend:async the driver orders the memory's next use after what other streams do.
    if (block->uses.empty() || !block->segment) {
      core.history.record(TraceAction::FreeCompleted, block->address, block->size, pool->stream(),
                          pool->id(), freed_by);
    }
  }
  if (!block->segment) [[unlikely]] {
    block->context.reset();
    release_async(pool, block);
  } else if (block->uses.empty()) [[likely]] {
    if (block->context) [[unlikely]]
      block->context.reset();
    pool->put(block);
  } else {
    pool->put_pending(block);
  }
}

void CachingAllocator::record_stream(void* context, StreamHandle stream) {
  record_stream(context, stream, core_->device);
}

void CachingAllocator::record_stream(void* context, StreamHandle stream, DeviceApi& device) {
  if (!context || in_forked_child()) return;
  auto* block = static_cast<Block*>(context);
  const std::lock_guard lock(block->pool->lock);
  if (stream == block->pool->stream() && &device == &block->pool->core().device) return;
  const StreamUse use = AllocatorCore::use_by(device, stream);
  if (std::find(block->uses.begin(), block->uses.end(), use) == block->uses.end()) {
    block->uses.push_back(use);
  }
}

StreamHandle CachingAllocator::stream_of(void* context) {
  return static_cast<Block*>(context)->pool->stream();
}
MempoolId CachingAllocator::pool_of(void* context) {
  return static_cast<Block*>(context)->pool->id();
}
size_t CachingAllocator::block_size(void* context) { return static_cast<Block*>(context)->size; }

void CachingAllocator::apply_limits() {
  const auto share = static_cast<double>(core_->total_memory) * fraction_;
  const size_t by_fraction =
      fraction_ < 1 ? static_cast<size_t>(share) : AllocatorSettings::kNoLimit;
  core_->limit.store(std::min(by_fraction, absolute_limit_));
}

void CachingAllocator::set_memory_fraction(double fraction) {
  check_value(fraction >= 0 && fraction <= 1, "Invalid fraction value: ", fraction,
              ". Allowed range: 0~1");
  const std::lock_guard lock(stats_mutex_);
  fraction_ = fraction;
  apply_limits();
}

void CachingAllocator::set_memory_limit(size_t nbytes) {
  const std::lock_guard lock(stats_mutex_);
  absolute_limit_ = nbytes;
  apply_limits();
}

double CachingAllocator::memory_fraction() {
  const std::lock_guard lock(stats_mutex_);
  return fraction_;
}

void CachingAllocator::add_out_of_memory_observer(OutOfMemoryObserver observer) {
  const std::lock_guard lock(callback_mutex_);
  observers_.push_back(std::move(observer));
}

void CachingAllocator::set_out_of_memory_callback(OutOfMemoryCallback callback) {
  auto next = callback ? std::make_shared<const OutOfMemoryCallback>(std::move(callback)) : nullptr;
  const std::lock_guard lock(callback_mutex_);
  callback_.swap(next);
}

void CachingAllocator::record_history(const HistoryOptions& options) {
  core_->history.configure(options);
}

std::vector<CachingAllocator::Resolved> CachingAllocator::pools() {
  const std::lock_guard lock(pools_mutex_);
  std::vector<Resolved> out;
  out.reserve(pool_by_key_.size());
  for (const auto& [key, pool] : pool_by_key_) out.push_back({pool, pool->serial});
  return out;
}

}  // namespace vt::cuda
