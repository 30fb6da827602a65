// A device without hardware, on which the allocators are tested. It models memory, streams, events
// and captures, lets work finish late, fails calls on demand, and reports every misuse: work that
// uses memory that is not mapped or not ordered after its earlier uses, memory given back while
// work may still use it, mappings made twice, calls that a capture forbids, and leaks.
//
// Addresses are made up: nothing lies behind them. Thread-safe.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
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
  TrimAsync,
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

class SimulatedPeer;

class SimulatedDevice final : public DeviceApi {
 public:
  explicit SimulatedDevice(const SimulatedOptions& options = {});
  ~SimulatedDevice() override;

  // Streams. The null handle is a stream too, one of each device.
  StreamHandle create_stream();
  /// A second device of the same machine, made by the first call: with streams and events of its
  /// own, whose handles mean nothing to this one, and all else shared. Events of one may be waited
  /// for on the other, as the driver allows, but are recorded on streams of their own device only.
  SimulatedPeer& peer();

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
  /// Called as the host begins to wait for a stream or an event.
  void set_wait_hook(std::function<void()> hook) { wait_hook_ = std::move(hook); }
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
  ApiStatus trim_async(size_t* released) override;
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
  friend class SimulatedPeer;
  static constexpr int kOwn = 0, kPeer = 1;
  struct Stream {
    int device = kOwn;
    VectorClock clock{};
    std::deque<VectorClock> unfinished{};
    uint64_t capture = 0;
  };
  struct Event {
    int device = kOwn;
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
  int index_of(StreamHandle stream, int device = kOwn);
  Stream& at(StreamHandle stream, int device = kOwn) {
    return streams_[static_cast<size_t>(index_of(stream, device))];
  }
  StreamHandle create_stream_on(int device);
  void launch_on(int device, StreamHandle stream, std::initializer_list<Use> uses);
  ApiStatus create_event_on(int device, EventHandle* event);
  ApiStatus record_event_on(int device, EventHandle event, StreamHandle stream);
  ApiStatus wait_event_on(int device, StreamHandle stream, EventHandle event);
  ApiStatus synchronize_stream_on(int device, StreamHandle stream);
  ApiStatus synchronize_device_on(int device);
  ApiStatus capture_id_on(int device, StreamHandle stream, uint64_t* id);
  Event* event_at(EventHandle event, const char* call);
  bool is_usable(uintptr_t address, size_t nbytes) const;
  void finish(const VectorClock& clock);
  void advance_locked();
  void record_locked(Event& event, Stream& stream);
  void wait_locked(Stream& stream, const Event& event);
  ApiStatus new_area(Kind kind, size_t nbytes, size_t* used, size_t limit, uintptr_t* address);
  ApiStatus end_area(Kind kind, uintptr_t address, const VectorClock& clock, size_t* used);
  bool chance(double probability);

  SimulatedOptions options_;
  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  double progress_ = 0.5;
  std::function<void()> wait_hook_;

  std::vector<Stream> streams_;
  size_t peer_default_ = 0;  // the index of the peer's null stream; 0: there is no peer
  std::unique_ptr<SimulatedPeer> peer_;
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
  size_t async_kept_ = 0;  // bytes freed in the driver's pool, which it keeps

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

/// What is on the second device. Made by SimulatedDevice::peer.
class SimulatedPeer final : public DeviceApi {
 public:
  explicit SimulatedPeer(SimulatedDevice& machine) : m_(machine) {}

  StreamHandle create_stream() { return m_.create_stream_on(kDevice); }
  void launch(StreamHandle stream, std::initializer_list<SimulatedDevice::Use> uses) {
    m_.launch_on(kDevice, stream, uses);
  }

  bool supports_virtual_memory() const override { return m_.supports_virtual_memory(); }
  bool supports_async_allocation() const override { return m_.supports_async_allocation(); }
  size_t granularity() const override { return m_.granularity(); }
  ApiStatus memory_info(size_t* free, size_t* total) override {
    return m_.memory_info(free, total);
  }
  ApiStatus reserve_range(size_t n, uintptr_t* a) override { return m_.reserve_range(n, a); }
  ApiStatus free_range(uintptr_t a, size_t n) override { return m_.free_range(a, n); }
  ApiStatus create_physical(size_t n, PhysicalHandle* h) override {
    return m_.create_physical(n, h);
  }
  ApiStatus release_physical(PhysicalHandle h) override { return m_.release_physical(h); }
  ApiStatus map(uintptr_t a, size_t n, PhysicalHandle h) override { return m_.map(a, n, h); }
  ApiStatus unmap(uintptr_t a, size_t n) override { return m_.unmap(a, n); }
  ApiStatus set_access(uintptr_t a, size_t n) override { return m_.set_access(a, n); }
  ApiStatus allocate(size_t n, uintptr_t* a) override { return m_.allocate(n, a); }
  ApiStatus free(uintptr_t a) override { return m_.free(a); }
  ApiStatus allocate_async(size_t, StreamHandle, uintptr_t*) override { return unsupported(); }
  ApiStatus free_async(uintptr_t, StreamHandle) override { return unsupported(); }
  ApiStatus trim_async(size_t*) override { return unsupported(); }
  ApiStatus create_event(EventHandle* event) override { return m_.create_event_on(kDevice, event); }
  ApiStatus destroy_event(EventHandle event) override { return m_.destroy_event(event); }
  ApiStatus record_event(EventHandle event, StreamHandle stream) override {
    return m_.record_event_on(kDevice, event, stream);
  }
  ApiStatus query_event(EventHandle event) override { return m_.query_event(event); }
  ApiStatus synchronize_event(EventHandle event) override { return m_.synchronize_event(event); }
  ApiStatus wait_event(StreamHandle stream, EventHandle event) override {
    return m_.wait_event_on(kDevice, stream, event);
  }
  ApiStatus synchronize_stream(StreamHandle stream) override {
    return m_.synchronize_stream_on(kDevice, stream);
  }
  ApiStatus synchronize_device() override { return m_.synchronize_device_on(kDevice); }
  ApiStatus capture_id(StreamHandle stream, uint64_t* id) override {
    return m_.capture_id_on(kDevice, stream, id);
  }
  ApiStatus allocate_host(size_t n, void** data) override { return m_.allocate_host(n, data); }
  ApiStatus free_host(void* data) override { return m_.free_host(data); }

 private:
  static constexpr int kDevice = SimulatedDevice::kPeer;
  static ApiStatus unsupported() { return {ApiCode::NotSupported, 0, "not simulated"}; }

  SimulatedDevice& m_;
};

}  // namespace vt::cuda
