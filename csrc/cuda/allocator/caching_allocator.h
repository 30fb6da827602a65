// The stream-ordered caching allocator of one device.
//
// Memory belongs to the stream it was allocated for and is reused in that stream's order, without
// waiting. Each (pool, stream) pair is a StreamPool with a lock of its own; the route from a
// thread's current stream to its StreamPool is cached in the thread. In steady state an allocation
// takes that one lock and makes no driver call. When memory runs out the ladder in
// `allocate_slowly` is climbed before OutOfMemory is thrown.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/allocator.h"
#include "cuda/allocator/core.h"
#include "cuda/allocator/mempool.h"
#include "cuda/allocator/snapshot.h"
#include "cuda/allocator/stream_pool.h"

namespace vt::cuda {

/// Memory of one stream in one pool.
struct PoolUsage {
  MempoolId pool{};
  StreamHandle stream = nullptr;
  int use_count = 0;     // of the pool; 0: nobody holds it, its cached memory may be given back
  size_t allocated = 0;  // bytes handed out
  size_t pending = 0;    // bytes that wait for other streams
  size_t cached = 0;     // bytes free for reuse
  size_t reserved = 0;   // the sum of these
  size_t largest_free = 0;
  int64_t blocks = 0;  // handed out or pending
};

class CachingAllocator {
 public:
  /// Asked when memory is short, with the bytes wanted and without locks held: true if it freed
  /// memory, so that another try is worth it.
  using OutOfMemoryCallback = std::function<bool(size_t nbytes)>;

  /// Told of every OutOfMemory before it is thrown, without locks held; it may take a snapshot.
  struct OutOfMemoryEvent {
    int device_index;
    size_t requested, total, free;  // of the device, bytes
  };
  using OutOfMemoryObserver = std::function<void(const OutOfMemoryEvent&)>;

  /// `device` must outlive the allocator. Throws what settings or the device refuse.
  CachingAllocator(DeviceApi& device, int device_index, const AllocatorSettings& settings);
  /// Gives everything back. Allocations still alive keep their memory until the process ends, and
  /// may be released later without harm.
  ~CachingAllocator();
  CachingAllocator(const CachingAllocator&) = delete;
  CachingAllocator& operator=(const CachingAllocator&) = delete;

  /// At least `nbytes`, aligned to 512, for work on `stream`. Zero bytes: a null pointer, of no
  /// stream. Throws OutOfMemory with a table of who holds what, Runtime when the driver fails.
  Allocation allocate(size_t nbytes, StreamHandle stream);
  /// Whether an allocation with this release function is one of ours, so that its `context` may be
  /// given to the functions below.
  static bool made(decltype(Allocation::release) release_function) {
    return release_function == &release;
  }
  /// Tells that work on `stream` uses the allocation (its `context`) too: when it is released, its
  /// memory is not reused before that work is done. The stream is one of `device`, which must
  /// outlive the allocator; without it, of the allocator's own.
  void record_stream(void* context, StreamHandle stream, DeviceApi& device);
  void record_stream(void* context, StreamHandle stream);
  /// The stream an allocation belongs to, and its pool.
  static StreamHandle stream_of(void* context);
  static MempoolId pool_of(void* context);
  static size_t block_size(void* context);

  /// Gives cached memory back to the driver: that of every stream, and of private pools that
  /// nobody holds. Waits for the streams concerned. Returns the bytes given back.
  size_t empty_cache();
  /// Makes memory free that streams are done with, where it was given back while they used it.
  void process_pending();
  /// Call before a stream is destroyed, as its handle may come back for another stream: waits for
  /// it and gives back what it cached.
  void release_stream(StreamHandle stream);

  // Private pools. A pool is held by use counts: whoever captures into it or shares it holds one.
  MempoolId create_pool();            // with one use
  MempoolId create_user_pool();       // the same, named {n, 0} as torch names a MemPool
  void hold_pool(MempoolId pool);     // one more use; makes the pool where it does not exist
  void retain_pool(MempoolId pool);   // one more
  void release_pool(MempoolId pool);  // one less; with none left its memory may be reclaimed
  int use_count(MempoolId pool) const;
  /// Sends the allocations that `route` matches to `pool`, until `end_allocate_to_pool`. The
  /// route begun last wins. Holds a use of the pool meanwhile.
  void begin_allocate_to_pool(MempoolId pool, const AllocationRoute& route);
  /// Ends the route of `pool` begun last, by this thread if there is one.
  void end_allocate_to_pool(MempoolId pool);

  // Limits: the lower one counts. A limit below what is reserved stops growth only.
  void set_memory_fraction(double fraction);  // of the device's memory, 0 to 1
  void set_memory_limit(size_t nbytes);
  size_t memory_limit() const { return core_->limit.load(); }
  double memory_fraction();
  void set_out_of_memory_callback(OutOfMemoryCallback callback);
  void add_out_of_memory_observer(OutOfMemoryObserver observer);

  // What there is to see.
  MemoryStats stats();
  void reset_peak_stats();
  void reset_accumulated_stats();
  std::vector<PoolUsage> usage();
  /// With the events recorded, or without.
  Snapshot snapshot(bool with_trace = true);
  void record_history(const HistoryOptions& options);
  std::string out_of_memory_report(size_t nbytes, const ApiStatus& status);
  /// What is inconsistent, for tests; empty when all is well. No other thread may be active.
  std::string check_invariants();

  const AllocatorSettings& settings() const { return core_->settings; }
  int device_index() const { return core_->device_index; }

 private:
  struct PrivatePool {
    int use_count = 0;
  };
  struct ActiveRoute {
    MempoolId pool;
    AllocationRoute route;
    std::thread::id begun_by;
  };
  using PoolKey = std::pair<MempoolId, StreamHandle>;
  /// A pool as it was found: once its lock is held, `serial` tells whether it still is that pool.
  struct Resolved {
    StreamPool* pool;
    uint64_t serial;
  };

  size_t block_size_of(size_t nbytes) const;
  Resolved route(StreamHandle stream);
  Resolved find_pool(StreamHandle stream, uint64_t* epoch);
  Allocation hand_over(Block* block, size_t nbytes);
  Allocation allocate_slowly(size_t nbytes, size_t size, StreamHandle stream,
                             AllocationContext context);
  Block* try_allocate(const Resolved& target, BlockKind kind, size_t size, size_t nbytes,
                      AllocationContext& context, ApiStatus* status, bool* stale);
  Allocation allocate_async(size_t nbytes, size_t size, StreamHandle stream,
                            AllocationContext context);
  static void release(void* context, void* data, size_t nbytes) noexcept;
  static void release_async(StreamPool* pool, Block* block) noexcept;
  size_t garbage(const StreamPool& pool, size_t size) const;

  // The rungs of the ladder. Each takes one pool's lock at a time, and none while the host waits.
  void wait_for_pending();
  size_t release_cached(bool private_pools);
  size_t release_cached(const Resolved& target, size_t most, uint64_t older_than);
  bool call_out_of_memory_callback(size_t nbytes);
  [[noreturn]] void throw_out_of_memory(size_t nbytes, const ApiStatus& status, StreamHandle stream,
                                        AllocationContext context);

  std::vector<Resolved> pools();  // those in use
  void retire_empty_pools();
  void end_use(MempoolId pool);
  void apply_limits();
  MempoolId new_pool(bool user);
  void check_exists(MempoolId pool, const char* function) const;
  void next_epoch();

  std::unique_ptr<AllocatorCore> core_;
  std::atomic<uint64_t> epoch_{0};  // of routes; unique among all allocators

  mutable std::mutex pools_mutex_;  // guards the five below; taken before a pool's lock
  std::map<PoolKey, StreamPool*> pool_by_key_;
  std::vector<std::unique_ptr<StreamPool>> all_pools_;  // never shrinks
  std::vector<StreamPool*> retired_;
  std::map<MempoolId, PrivatePool> private_pools_;
  std::vector<ActiveRoute> routes_;
  PoolCounters retired_counters_;

  std::mutex ladder_mutex_;  // one thread climbs at a time
  std::mutex callback_mutex_;
  std::shared_ptr<const OutOfMemoryCallback> callback_;
  std::vector<OutOfMemoryObserver> observers_;
  std::mutex stats_mutex_;  // guards what follows
  double fraction_ = 1;
  size_t absolute_limit_ = AllocatorSettings::kNoLimit;
  MemoryStats baseline_;  // what reset_accumulated_stats subtracts
  std::array<int64_t, kKinds + 1> inactive_peaks_{}, inactive_byte_peaks_{};
};

/// True in a child of fork(): the parent's driver state is of no use there.
bool in_forked_child();

}  // namespace vt::cuda
