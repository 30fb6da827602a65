#include "cuda/allocator/simulated_device.h"

#include <algorithm>
#include <cstdio>

#include "cuda/allocator/block.h"

namespace vt::cuda {
namespace {

constexpr size_t kTraceLines = 64;
constexpr const char* kCallNames[] = {"memory_info",
                                      "reserve_range",
                                      "free_range",
                                      "create_physical",
                                      "release_physical",
                                      "map",
                                      "unmap",
                                      "set_access",
                                      "allocate",
                                      "free",
                                      "allocate_async",
                                      "free_async",
                                      "trim_async",
                                      "create_event",
                                      "destroy_event",
                                      "record_event",
                                      "query_event",
                                      "synchronize_event",
                                      "wait_event",
                                      "synchronize_stream",
                                      "synchronize_device",
                                      "capture_id",
                                      "allocate_host",
                                      "free_host",
                                      "launch"};
static_assert(std::size(kCallNames) == kSimulatedCalls);
constexpr const char* kCodeNames[] = {"ok",        "not ready", "out of memory", "not supported",
                                      "capturing", "dead",      "failed"};

using Guard = std::lock_guard<std::mutex>;

uint64_t number(const void* handle) { return reinterpret_cast<uintptr_t>(handle); }

}  // namespace

SimulatedDevice::SimulatedDevice(const SimulatedOptions& options)
    : options_(options), random_(options.seed) {
  streams_.reserve(kSimulatedStreams);
  streams_.emplace_back();
}

SimulatedDevice::~SimulatedDevice() = default;

// Streams, work and time.

SimulatedPeer& SimulatedDevice::peer() {
  const Guard guard(mutex_);
  if (!peer_) {
    peer_default_ = streams_.size();
    streams_.push_back({.device = kPeer});
    peer_ = std::make_unique<SimulatedPeer>(*this);
  }
  return *peer_;
}

StreamHandle SimulatedDevice::create_stream() { return create_stream_on(kOwn); }
StreamHandle SimulatedDevice::create_stream_on(int device) {
  const Guard guard(mutex_);
  if (streams_.size() == kSimulatedStreams) {
    misused("too many streams for the simulation");
    return nullptr;
  }
  streams_.push_back({.device = device});
  return reinterpret_cast<StreamHandle>((streams_.size() - 1) * 256);
}

int SimulatedDevice::index_of(StreamHandle stream, int device) {
  const size_t null = device == kPeer ? peer_default_ : 0;
  const uint64_t index = stream ? number(stream) / 256 : null;
  if (number(stream) % 256 == 0 && index < streams_.size() && streams_[index].device == device)
    return static_cast<int>(index);
  misused("an unknown stream is used");
  return static_cast<int>(null);
}

void SimulatedDevice::launch(StreamHandle handle, std::initializer_list<Use> uses) {
  launch_on(kOwn, handle, uses);
}
void SimulatedDevice::launch_on(int device, StreamHandle handle, std::initializer_list<Use> uses) {
  const Guard guard(mutex_);
  const int index = index_of(handle, device);
  Stream& stream = streams_[static_cast<size_t>(index)];
  stream.clock.join(host_);
  ++stream.clock.at[static_cast<size_t>(index)];
  stream.unfinished.push_back(stream.clock);
  for (const Use& use : uses) {
    ++counts_[static_cast<size_t>(SimulatedCall::Launch)];
    trace_.push_back({SimulatedCall::Launch, ApiCode::Ok, use.address, number(handle)});
    if (!is_usable(use.address, use.nbytes)) misused("work uses memory that is not mapped");
    const std::string wrong =
        accesses_.use(use.address, use.nbytes, use.write, index, stream.clock);
    if (!wrong.empty()) {
      misused("a " + std::string(use.write ? "write" : "read") + " on stream " +
              std::to_string(index) + " is not ordered after " + wrong);
    }
  }
  while (trace_.size() > kTraceLines) trace_.pop_front();
}

void SimulatedDevice::use_on_host(uintptr_t address, size_t nbytes) {
  const Guard guard(mutex_);
  if (!is_usable(address, nbytes)) misused("the host uses memory that is not there");
  const std::string wrong = accesses_.forget(address, nbytes, host_);
  if (!wrong.empty()) misused("the host uses memory before it knows the end of " + wrong);
}

void SimulatedDevice::finish(const VectorClock& clock) {
  finished_.join(clock);
  for (size_t s = 0; s < streams_.size(); ++s) {
    auto& work = streams_[s].unfinished;
    while (!work.empty() && work.front().at[s] <= finished_.at[s]) work.pop_front();
  }
}

void SimulatedDevice::advance_locked() {
  Stream& stream = streams_[random_() % streams_.size()];
  if (stream.unfinished.empty()) return;
  const VectorClock clock = stream.unfinished[random_() % stream.unfinished.size()];
  finish(clock);  // with all that came before it
}
void SimulatedDevice::advance() {
  const Guard guard(mutex_);
  advance_locked();
}
void SimulatedDevice::set_progress(double probability) {
  const Guard guard(mutex_);
  progress_ = probability;
}
bool SimulatedDevice::chance(double probability) {
  return probability > 0 && std::uniform_real_distribution<>(0, 1)(random_) < probability;
}

void SimulatedDevice::record_locked(Event& event, Stream& stream) {
  stream.clock.join(host_);
  event.clock = stream.clock;
  event.capture = stream.capture;
}

void SimulatedDevice::wait_locked(Stream& stream, const Event& event) {
  if (event.capture != 0) {
    const bool active = std::any_of(streams_.begin(), streams_.end(),
                                    [&](const Stream& s) { return s.capture == event.capture; });
    if (!active) {
      misused("a stream waits for an event of a capture that is over");
    } else if (stream.capture != 0 && stream.capture != event.capture) {
      misused("a capture waits for an event of another");
    }
    stream.capture = event.capture;
  } else if (stream.capture != 0) {
    misused("a capture waits for an event from outside it");
  }
  stream.clock.join(event.clock);
}

void SimulatedDevice::wait_stream(StreamHandle waiter, StreamHandle other) {
  const Guard guard(mutex_);
  Event event;
  record_locked(event, at(other));
  wait_locked(at(waiter), event);
}

void SimulatedDevice::begin_capture(StreamHandle stream) {
  const Guard guard(mutex_);
  at(stream).capture = ++last_capture_;
}
void SimulatedDevice::end_capture(StreamHandle stream) {
  const Guard guard(mutex_);
  const uint64_t id = at(stream).capture;
  for (Stream& s : streams_) {
    if (s.capture != id) continue;
    at(stream).clock.join(s.clock);  // a capture ends with its streams joined
    s.capture = 0;
  }
}

// Faults and reports.

ApiStatus SimulatedDevice::enter(SimulatedCall call, uint64_t a, uint64_t b) {
  const auto kind = static_cast<size_t>(call);
  ++counts_[kind];
  ++total_;
  ApiStatus status;
  if (dead_) {
    status = {ApiCode::Dead, 0, "the device is gone"};
  } else if (total_ == fail_at_ || (fail_call_at_[kind] != 0 && --fail_call_at_[kind] == 0) ||
             chance(fail_probability_)) {
    status = {fail_code_, 0, "a fault was injected"};
  }
  trace_.push_back({call, status.code, a, b});
  if (trace_.size() > kTraceLines) trace_.pop_front();
  return status;
}

ApiStatus SimulatedDevice::misused(const std::string& what) {
  if (misuse_.empty()) {
    misuse_ = what + "\nthe last calls:";
    for (const TraceLine& line : trace_) {
      char text[120];
      std::snprintf(
          text, sizeof text, "\n  %s(%#llx, %#llx) -> %s", kCallNames[static_cast<int>(line.call)],
          static_cast<unsigned long long>(line.a), static_cast<unsigned long long>(line.b),
          kCodeNames[static_cast<int>(line.result)]);
      misuse_ += text;
    }
  } else if (misuse_.size() < 20000) {
    misuse_ += "\nthen: " + what;
  }
  return {ApiCode::Failed, 0, "the call is a misuse of the device"};
}

void SimulatedDevice::fail_nth_call(int64_t n, ApiCode code) {
  const Guard guard(mutex_);
  fail_at_ = total_ + n;
  fail_code_ = code;
}
void SimulatedDevice::fail_nth_call(SimulatedCall call, int64_t n, ApiCode code) {
  const Guard guard(mutex_);
  fail_call_at_[static_cast<size_t>(call)] = n;
  fail_code_ = code;
}
void SimulatedDevice::fail_randomly(double probability, ApiCode code) {
  const Guard guard(mutex_);
  fail_probability_ = probability;
  fail_code_ = code;
}
void SimulatedDevice::clear_faults() {
  const Guard guard(mutex_);
  fail_at_ = -1;
  fail_call_at_ = {};
  fail_probability_ = 0;
}
void SimulatedDevice::kill() {
  const Guard guard(mutex_);
  dead_ = true;
}
int64_t SimulatedDevice::calls() const {
  const Guard guard(mutex_);
  return total_;
}
int64_t SimulatedDevice::calls(SimulatedCall call) const {
  const Guard guard(mutex_);
  return counts_[static_cast<size_t>(call)];
}
size_t SimulatedDevice::memory_in_use() const {
  const Guard guard(mutex_);
  return used_;
}
std::string SimulatedDevice::misuse() const {
  const Guard guard(mutex_);
  return misuse_;
}

std::string SimulatedDevice::leaks() const {
  const Guard guard(mutex_);
  std::string out;
  const auto note = [&](size_t count, const char* what) {
    if (count) out += (out.empty() ? "" : ", ") + std::to_string(count) + " " + what;
  };
  note(used_ - async_kept_, "bytes of device memory");
  note(host_used_, "bytes of host memory");
  note(ranges_.size(), "address ranges");
  note(mappings_.size(), "mappings");
  note(areas_.size(), "allocations");
  note(static_cast<size_t>(live_events_), "events");
  return out;
}

// Memory.

bool SimulatedDevice::is_usable(uintptr_t address, size_t nbytes) const {
  auto area = areas_.upper_bound(address);
  if (area != areas_.begin()) {
    --area;
    if (address + nbytes <= area->first + area->second.nbytes) return true;
  }
  uintptr_t at = address;
  while (at < address + nbytes) {
    auto it = mappings_.upper_bound(at);
    if (it == mappings_.begin()) return false;
    --it;
    if (!it->second.accessible || at >= it->first + it->second.nbytes) return false;
    at = it->first + it->second.nbytes;
  }
  return true;
}

ApiStatus SimulatedDevice::memory_info(size_t* free, size_t* total) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::MemoryInfo);
  if (!status.ok()) return status;
  *free = options_.memory - used_;
  *total = options_.memory;
  return {};
}

ApiStatus SimulatedDevice::reserve_range(size_t nbytes, uintptr_t* address) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::ReserveRange, nbytes);
  if (!status.ok()) return status;
  if (nbytes == 0 || nbytes % options_.granularity) return misused("an odd range is reserved");
  *address = next_address_;
  next_address_ += nbytes + options_.granularity;  // with a gap, so that overruns show
  ranges_[*address] = nbytes;
  return {};
}

ApiStatus SimulatedDevice::free_range(uintptr_t address, size_t nbytes) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::FreeRange, address, nbytes);
  if (!status.ok()) return status;
  const auto range = ranges_.find(address);
  if (range == ranges_.end() || range->second != nbytes) {
    return misused("a range that was not reserved is freed");
  }
  const auto inside = mappings_.lower_bound(address);
  if (inside != mappings_.end() && inside->first < address + nbytes) {
    return misused("a range is freed with memory mapped in it");
  }
  ranges_.erase(range);
  return {};
}

ApiStatus SimulatedDevice::create_physical(size_t nbytes, PhysicalHandle* handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::CreatePhysical, nbytes);
  if (!status.ok()) return status;
  if (nbytes == 0 || nbytes % options_.granularity) return misused("an odd handle is created");
  if (used_ + nbytes > options_.memory) return {ApiCode::OutOfMemory, 2, "out of memory"};
  used_ += nbytes;
  physical_.push_back({.nbytes = nbytes});
  *handle = physical_.size();
  return {};
}

ApiStatus SimulatedDevice::release_physical(PhysicalHandle handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::ReleasePhysical, handle);
  if (!status.ok()) return status;
  if (handle == 0 || handle > physical_.size() || physical_[handle - 1].released) {
    return misused("a handle is released that is not there");
  }
  Physical& physical = physical_[handle - 1];
  physical.released = true;
  if (physical.mappings == 0) used_ -= physical.nbytes;
  return {};
}

ApiStatus SimulatedDevice::map(uintptr_t address, size_t nbytes, PhysicalHandle handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::Map, address, handle);
  if (!status.ok()) return status;
  auto range = ranges_.upper_bound(address);
  if (range == ranges_.begin() || (--range, address + nbytes > range->first + range->second)) {
    return misused("memory is mapped outside a reserved range");
  }
  const auto next = mappings_.lower_bound(address);
  if (next != mappings_.end() && next->first < address + nbytes) {
    return misused("memory is mapped over a mapping");
  }
  if (next != mappings_.begin() &&
      std::prev(next)->first + std::prev(next)->second.nbytes > address) {
    return misused("memory is mapped over a mapping");
  }
  if (handle == 0 || handle > physical_.size() || physical_[handle - 1].released ||
      physical_[handle - 1].nbytes != nbytes) {
    return misused("a handle is mapped that is not there or has another size");
  }
  ++physical_[handle - 1].mappings;
  mappings_[address] = {nbytes, handle, false};
  return {};
}

ApiStatus SimulatedDevice::unmap(uintptr_t address, size_t nbytes) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::Unmap, address, nbytes);
  if (!status.ok()) return status;
  const auto mapping = mappings_.find(address);
  if (mapping == mappings_.end() || mapping->second.nbytes != nbytes) {
    return misused("memory is unmapped that is not mapped");
  }
  const std::string wrong = accesses_.forget(address, nbytes, host_);
  if (!wrong.empty()) misused("memory is unmapped before the host knows the end of " + wrong);
  Physical& physical = physical_[mapping->second.handle - 1];
  if (--physical.mappings == 0 && physical.released) used_ -= physical.nbytes;
  mappings_.erase(mapping);
  return {};
}

ApiStatus SimulatedDevice::set_access(uintptr_t address, size_t nbytes) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::SetAccess, address, nbytes);
  if (!status.ok()) return status;
  uintptr_t at = address;
  for (auto it = mappings_.find(address); at < address + nbytes; ++it) {
    if (it == mappings_.end() || it->first != at) {
      return misused("access is set to memory that is not mapped");
    }
    it->second.accessible = true;
    at += it->second.nbytes;
  }
  return {};
}

ApiStatus SimulatedDevice::new_area(Kind kind, size_t nbytes, size_t* used, size_t limit,
                                    uintptr_t* address) {
  if (*used + nbytes > limit) return {ApiCode::OutOfMemory, 2, "out of memory"};
  *used += nbytes;
  *address = next_address_;
  next_address_ += align_up(nbytes, 4096) + 4096;
  areas_[*address] = {nbytes, kind};
  return {};
}

ApiStatus SimulatedDevice::end_area(Kind kind, uintptr_t address, const VectorClock& clock,
                                    size_t* used) {
  const auto area = areas_.find(address);
  if (area == areas_.end() || area->second.kind != kind) {
    return misused("memory is freed that was not allocated so");
  }
  const std::string wrong = accesses_.forget(address, area->second.nbytes, clock);
  if (!wrong.empty()) misused("memory is freed with no order to " + wrong);
  *used -= area->second.nbytes;
  areas_.erase(area);
  return {};
}

ApiStatus SimulatedDevice::allocate(size_t nbytes, uintptr_t* address) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::Allocate, nbytes);
  if (!status.ok()) return status;
  return new_area(Kind::Plain, nbytes, &used_, options_.memory, address);
}
ApiStatus SimulatedDevice::free(uintptr_t address) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::Free, address);
  if (!status.ok()) return status;
  return end_area(Kind::Plain, address, host_, &used_);
}
ApiStatus SimulatedDevice::allocate_async(size_t nbytes, StreamHandle stream, uintptr_t* address) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::AllocateAsync, nbytes, number(stream));
  if (!status.ok()) return status;
  const size_t reused = std::min(async_kept_, nbytes);
  async_kept_ -= reused;
  used_ -= reused;
  return new_area(Kind::Async, nbytes, &used_, options_.memory, address);
}
ApiStatus SimulatedDevice::free_async(uintptr_t address, StreamHandle stream) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::FreeAsync, address, number(stream));
  if (!status.ok()) return status;
  at(stream).clock.join(host_);
  const size_t before = used_;
  const ApiStatus ended = end_area(Kind::Async, address, at(stream).clock, &used_);
  async_kept_ += before - used_;
  used_ = before;
  return ended;
}
ApiStatus SimulatedDevice::trim_async(size_t* released) {
  const Guard guard(mutex_);
  *released = 0;
  const ApiStatus status = enter(SimulatedCall::TrimAsync);
  if (!status.ok()) return status;
  *released = async_kept_;
  used_ -= async_kept_;
  async_kept_ = 0;
  return {};
}
ApiStatus SimulatedDevice::allocate_host(size_t nbytes, void** data) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::AllocateHost, nbytes);
  if (!status.ok()) return status;
  uintptr_t address = 0;
  const ApiStatus made = new_area(Kind::Host, nbytes, &host_used_, options_.host_memory, &address);
  if (made.ok()) *data = reinterpret_cast<void*>(address);
  return made;
}
ApiStatus SimulatedDevice::free_host(void* data) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::FreeHost, number(data));
  if (!status.ok()) return status;
  return end_area(Kind::Host, number(data), host_, &host_used_);
}

// Events and waiting.

SimulatedDevice::Event* SimulatedDevice::event_at(EventHandle handle, const char* call) {
  const uint64_t index = number(handle);
  if (index == 0 || index > events_.size() || events_[index - 1].destroyed) {
    misused(std::string(call) + ": the event is not there");
    return nullptr;
  }
  return &events_[index - 1];
}

ApiStatus SimulatedDevice::create_event(EventHandle* event) { return create_event_on(kOwn, event); }
ApiStatus SimulatedDevice::create_event_on(int device, EventHandle* event) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::CreateEvent);
  if (!status.ok()) return status;
  events_.push_back({.device = device});
  ++live_events_;
  *event = reinterpret_cast<EventHandle>(events_.size());
  return {};
}
ApiStatus SimulatedDevice::destroy_event(EventHandle handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::DestroyEvent, number(handle));
  if (!status.ok()) return status;
  Event* event = event_at(handle, "destroy_event");
  if (!event) return {ApiCode::Failed};
  event->destroyed = true;
  --live_events_;
  return {};
}
ApiStatus SimulatedDevice::record_event(EventHandle handle, StreamHandle stream) {
  return record_event_on(kOwn, handle, stream);
}
ApiStatus SimulatedDevice::record_event_on(int device, EventHandle handle, StreamHandle stream) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::RecordEvent, number(handle), number(stream));
  if (!status.ok()) return status;
  Event* event = event_at(handle, "record_event");
  if (!event) return {ApiCode::Failed};
  if (event->device != device) {
    return misused("an event is recorded on a stream of another device");
  }
  record_locked(*event, at(stream, device));
  return {};
}
ApiStatus SimulatedDevice::query_event(EventHandle handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::QueryEvent, number(handle));
  if (!status.ok()) return status;
  const Event* event = event_at(handle, "query_event");
  if (!event) return {ApiCode::Failed};
  if (event->capture != 0) return misused("an event of a capture is queried");
  if (chance(progress_)) advance_locked();
  if (!finished_.covers(event->clock)) return {ApiCode::NotReady};
  host_.join(event->clock);
  return {};
}
ApiStatus SimulatedDevice::synchronize_event(EventHandle handle) {
  if (wait_hook_) wait_hook_();
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::SynchronizeEvent, number(handle));
  if (!status.ok()) return status;
  const Event* event = event_at(handle, "synchronize_event");
  if (!event) return {ApiCode::Failed};
  if (event->capture != 0) return misused("an event of a capture is waited for");
  finish(event->clock);
  host_.join(event->clock);
  return {};
}
ApiStatus SimulatedDevice::wait_event(StreamHandle stream, EventHandle handle) {
  return wait_event_on(kOwn, stream, handle);
}
ApiStatus SimulatedDevice::wait_event_on(int device, StreamHandle stream, EventHandle handle) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::WaitEvent, number(stream), number(handle));
  if (!status.ok()) return status;
  const Event* event = event_at(handle, "wait_event");
  if (!event) return {ApiCode::Failed};
  wait_locked(at(stream, device), *event);
  return {};
}
ApiStatus SimulatedDevice::synchronize_stream(StreamHandle handle) {
  return synchronize_stream_on(kOwn, handle);
}
ApiStatus SimulatedDevice::synchronize_stream_on(int device, StreamHandle handle) {
  if (wait_hook_) wait_hook_();
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::SynchronizeStream, number(handle));
  if (!status.ok()) return status;
  const Stream& stream = at(handle, device);
  if (stream.capture != 0) return misused("a stream is synchronised while it is captured");
  finish(stream.clock);
  host_.join(stream.clock);
  return {};
}
ApiStatus SimulatedDevice::synchronize_device() { return synchronize_device_on(kOwn); }
ApiStatus SimulatedDevice::synchronize_device_on(int device) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::SynchronizeDevice);
  if (!status.ok()) return status;
  for (const Stream& stream : streams_) {
    if (stream.device == device && stream.capture != 0)
      return misused("the device is synchronised during a capture");
  }
  for (const Stream& stream : streams_) {
    if (stream.device != device) continue;
    finish(stream.clock);
    host_.join(stream.clock);
  }
  return {};
}
ApiStatus SimulatedDevice::capture_id(StreamHandle stream, uint64_t* id) {
  return capture_id_on(kOwn, stream, id);
}
ApiStatus SimulatedDevice::capture_id_on(int device, StreamHandle stream, uint64_t* id) {
  const Guard guard(mutex_);
  const ApiStatus status = enter(SimulatedCall::CaptureId, number(stream));
  if (!status.ok()) return status;
  *id = at(stream, device).capture;
  return {};
}

}  // namespace vt::cuda
