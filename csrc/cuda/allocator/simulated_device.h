// A device without hardware, on which the allocators are tested. It models memory, streams, events
// and captures, lets work finish late, fails calls on demand, and reports every misuse: work that
// uses memory that is not mapped or not ordered after its earlier uses, memory given back while
// work may still use it, mappings made twice, calls that a capture forbids, and leaks.
//
// Addresses are made up: nothing lies behind them. Thread-safe.
#pragma once

#include <array>
#include <deque>
#include <initializer_list>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda/allocator/device_api.h"
#include "cuda/allocator/simulated_clock.h"

namespace vt::cuda {

enum class SimulatedCall : uint8_t {
  MemoryInfo,
  ReserveRange,
  FreeRange,
  CreatePhysical,
  ReleasePhysical,
  Map,
  Unmap,
  SetAccess,
  Allocate,
  Free,
  AllocateAsync,
  FreeAsync,
  CreateEvent,
  DestroyEvent,
  RecordEvent,
  QueryEvent,
  SynchronizeEvent,
  WaitEvent,
  SynchronizeStream,
  SynchronizeDevice,
  CaptureId,
  AllocateHost,
  FreeHost,
  Launch,  // for the trace; never fails
};
inline constexpr int kSimulatedCalls = static_cast<int>(SimulatedCall::Launch) + 1;

struct SimulatedOptions {
  size_t memory = size_t{1} << 30;
  size_t host_memory = size_t{1} << 30;
  size_t granularity = size_t{2} << 20;
  bool virtual_memory = true;
  bool async_allocation = true;
  uint64_t seed = 1;  // of when work finishes, and of random faults
};

class SimulatedDevice final : public DeviceApi {
 public:
  explicit SimulatedDevice(const SimulatedOptions& options = {});

  // Streams. The null handle is a stream too.
  StreamHandle create_stream();

  struct Use {
    uintptr_t address;
    size_t nbytes;
    bool write;
  };
  /// Issues work that uses memory.
  void launch(StreamHandle stream, std::initializer_list<Use> uses);
  /// The host reads or writes memory itself.
  void use_on_host(uintptr_t address, size_t nbytes);
  /// `waiter` waits for all that `other` has been given.
  void wait_stream(StreamHandle waiter, StreamHandle other);
  /// Some of the work given to the streams finishes.
  void advance();
  /// How often a query finds that work has finished meanwhile; 0 to 1.
  void set_progress(double probability);

  void begin_capture(StreamHandle stream);
  void end_capture(StreamHandle stream);

  // Faults.
  void fail_nth_call(int64_t n, ApiCode code);  // the n-th from now, counted from 1
  void fail_nth_call(SimulatedCall call, int64_t n, ApiCode code);
  void fail_randomly(double probability, ApiCode code);
  void clear_faults();
  /// The process is exiting: every call from now on returns Dead.
  void kill();

  int64_t calls() const;
  int64_t calls(SimulatedCall call) const;
  size_t memory_in_use() const;
  /// Misuse so far with the calls that led to it; empty when there was none.
  std::string misuse() const;
  /// What was not given back; empty when nothing.
  std::string leaks() const;

  bool supports_virtual_memory() const override { return options_.virtual_memory; }
  bool supports_async_allocation() const override { return options_.async_allocation; }
  size_t granularity() const override { return options_.granularity; }
  ApiStatus memory_info(size_t* free, size_t* total) override;
  ApiStatus reserve_range(size_t nbytes, uintptr_t* address) override;
  ApiStatus free_range(uintptr_t address, size_t nbytes) override;
  ApiStatus create_physical(size_t nbytes, PhysicalHandle* handle) override;
  ApiStatus release_physical(PhysicalHandle handle) override;
  ApiStatus map(uintptr_t address, size_t nbytes, PhysicalHandle handle) override;
  ApiStatus unmap(uintptr_t address, size_t nbytes) override;
  ApiStatus set_access(uintptr_t address, size_t nbytes) override;
  ApiStatus allocate(size_t nbytes, uintptr_t* address) override;
  ApiStatus free(uintptr_t address) override;
  ApiStatus allocate_async(size_t nbytes, StreamHandle stream, uintptr_t* address) override;
  ApiStatus free_async(uintptr_t address, StreamHandle stream) override;
  ApiStatus create_event(EventHandle* event) override;
  ApiStatus destroy_event(EventHandle event) override;
  ApiStatus record_event(EventHandle event, StreamHandle stream) override;
  ApiStatus query_event(EventHandle event) override;
  ApiStatus synchronize_event(EventHandle event) override;
  ApiStatus wait_event(StreamHandle stream, EventHandle event) override;
  ApiStatus synchronize_stream(StreamHandle stream) override;
  ApiStatus synchronize_device() override;
  ApiStatus capture_id(StreamHandle stream, uint64_t* id) override;
  ApiStatus allocate_host(size_t nbytes, void** data) override;
  ApiStatus free_host(void* data) override;

 private:
  struct Stream {
    VectorClock clock{};
    std::deque<VectorClock> unfinished{};
    uint64_t capture = 0;
  };
  struct Event {
    VectorClock clock{};
    uint64_t capture = 0;
    bool destroyed = false;
  };
  struct Physical {
    size_t nbytes = 0;
    int mappings = 0;
    bool released = false;
  };
  struct Mapping {
    size_t nbytes = 0;
    PhysicalHandle handle = 0;
    bool accessible = false;
  };
  enum class Kind : uint8_t { Plain, Async, Host };
  struct Area {
    size_t nbytes = 0;
    Kind kind = Kind::Plain;
  };
  struct TraceLine {
    SimulatedCall call{};
    ApiCode result{};
    uint64_t a = 0, b = 0;
  };

  /// Notes a call; Ok if it may go on, else what it must return.
  ApiStatus enter(SimulatedCall call, uint64_t a = 0, uint64_t b = 0);
  ApiStatus misused(const std::string& what);
  int index_of(StreamHandle stream);
  Stream& at(StreamHandle stream) { return streams_[static_cast<size_t>(index_of(stream))]; }
  Event* event_at(EventHandle event, const char* call);
  bool is_usable(uintptr_t address, size_t nbytes) const;
  void finish(const VectorClock& clock);
  void advance_locked();
  void record_locked(Event& event, StreamHandle stream);
  void wait_locked(StreamHandle stream, const Event& event);
  ApiStatus new_area(Kind kind, size_t nbytes, size_t* used, size_t limit, uintptr_t* address);
  ApiStatus end_area(Kind kind, uintptr_t address, const VectorClock& clock, size_t* used);
  bool chance(double probability);

  SimulatedOptions options_;
  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  double progress_ = 0.5;

  std::vector<Stream> streams_;
  VectorClock finished_;  // work that is done
  VectorClock host_;      // work that the host knows to be done
  std::deque<Event> events_;
  int64_t live_events_ = 0;
  uint64_t last_capture_ = 0;

  AccessLog accesses_;
  uintptr_t next_address_ = uintptr_t{1} << 40;
  std::map<uintptr_t, size_t> ranges_;
  std::map<uintptr_t, Mapping> mappings_;
  std::deque<Physical> physical_;
  std::map<uintptr_t, Area> areas_;
  size_t used_ = 0, host_used_ = 0;

  std::array<int64_t, kSimulatedCalls> counts_{};
  int64_t total_ = 0;
  int64_t fail_at_ = -1;
  std::array<int64_t, kSimulatedCalls> fail_call_at_{};
  double fail_probability_ = 0;
  ApiCode fail_code_ = ApiCode::Failed;
  bool dead_ = false;
  std::deque<TraceLine> trace_;
  std::string misuse_;
};

}  // namespace vt::cuda
