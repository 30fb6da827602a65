// What the allocators need of a device: a plain interface over the driver, so that every policy
// can be tested on a simulated device (simulated_device.h). No call throws.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vt::cuda {

using StreamHandle = void*;       // CUstream
using EventHandle = void*;        // CUevent
using PhysicalHandle = uint64_t;  // CUmemGenericAllocationHandle; 0 is none

enum class ApiCode : uint8_t {
  Ok,
  NotReady,     // query_event: the work before the event still runs
  OutOfMemory,  // no memory of the kind asked for; freeing some may help
  NotSupported,
  Capturing,  // forbidden while the stream is being captured
  Dead,       // the context is gone (process exit): nothing is left to free
  Failed,     // anything else; `native` and `message` tell
};

/// The outcome of a call. `message` is a string that is never freed.
struct ApiStatus {
  ApiCode code = ApiCode::Ok;
  int native = 0;
  const char* message = "";

  bool ok() const { return code == ApiCode::Ok; }
  /// What was to be given back is gone: given back, or lost with its context.
  bool gone() const { return code == ApiCode::Ok || code == ApiCode::Dead; }
};

/// One device. Calls may come from any thread and at any time, also while a stream is being
/// captured: an implementation switches the thread's capture mode to relaxed around those that
/// reserve, map, allocate, query or synchronise.
class DeviceApi {
 public:
  virtual ~DeviceApi() = default;

  virtual bool supports_virtual_memory() const = 0;
  virtual bool supports_async_allocation() const = 0;
  /// Physical handles, mapped addresses and their sizes are multiples of this.
  virtual size_t granularity() const = 0;
  virtual ApiStatus memory_info(size_t* free, size_t* total) = 0;

  // Virtual memory: an address range, physical handles, and the map from one to the other.
  virtual ApiStatus reserve_range(size_t nbytes, uintptr_t* address) = 0;
  virtual ApiStatus free_range(uintptr_t address, size_t nbytes) = 0;
  virtual ApiStatus create_physical(size_t nbytes, PhysicalHandle* handle) = 0;
  virtual ApiStatus release_physical(PhysicalHandle handle) = 0;
  virtual ApiStatus map(uintptr_t address, size_t nbytes, PhysicalHandle handle) = 0;
  virtual ApiStatus unmap(uintptr_t address, size_t nbytes) = 0;
  virtual ApiStatus set_access(uintptr_t address, size_t nbytes) = 0;

  // Plain allocations, where there is no virtual memory interface or it is switched off.
  virtual ApiStatus allocate(size_t nbytes, uintptr_t* address) = 0;
  virtual ApiStatus free(uintptr_t address) = 0;

  // The driver's own stream-ordered pool (backend:async).
  virtual ApiStatus allocate_async(size_t nbytes, StreamHandle stream, uintptr_t* address) = 0;
  virtual ApiStatus free_async(uintptr_t address, StreamHandle stream) = 0;
  /// Gives back what the pool keeps of memory that was freed, as far as its streams are done with
  /// it; tells the bytes.
  virtual ApiStatus trim_async(size_t* released) = 0;

  virtual ApiStatus create_event(EventHandle* event) = 0;
  virtual ApiStatus destroy_event(EventHandle event) = 0;
  virtual ApiStatus record_event(EventHandle event, StreamHandle stream) = 0;
  /// Ok once the work before the event has finished, NotReady until then.
  virtual ApiStatus query_event(EventHandle event) = 0;
  virtual ApiStatus synchronize_event(EventHandle event) = 0;
  virtual ApiStatus wait_event(StreamHandle stream, EventHandle event) = 0;
  virtual ApiStatus synchronize_stream(StreamHandle stream) = 0;
  virtual ApiStatus synchronize_device() = 0;
  /// The id of the capture that `stream` takes part in; 0 when it is not being captured.
  virtual ApiStatus capture_id(StreamHandle stream, uint64_t* id) = 0;

  // Page-locked host memory, mapped into every device.
  virtual ApiStatus allocate_host(size_t nbytes, void** data) = 0;
  virtual ApiStatus free_host(void* data) = 0;
};

}  // namespace vt::cuda
