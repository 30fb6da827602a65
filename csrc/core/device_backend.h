// What the core must know of an accelerator: how many there are, which is current, and page-locked
// host memory. A backend library registers one object as it loads; the CPU has none.
#pragma once

#include <cstdint>
#include <string>

#include "core/allocator.h"

namespace vt {

class Storage;
struct Convolution;
enum class ConvolutionProduct : uint8_t;

class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;
  /// Usable devices; 0 where there is no driver.
  virtual int count() const = 0;
  /// Why count() is 0, in one sentence.
  virtual std::string problem() const = 0;
  /// The calling thread's current device.
  virtual int current() const = 0;
  /// Waits for all work on the device. Throws what that work failed with.
  virtual void synchronize(int device) = 0;
  /// Tells that work on `stream` (a driver handle) of `device`, whichever that is, uses the
  /// storage: if its bytes are ours, they are not handed out again before that work is done.
  virtual void record_stream(const Storage& storage, int device, uintptr_t stream) = 0;
  /// The calling thread's current stream on a device, as a driver handle; 0 is the default stream.
  virtual uintptr_t current_stream(int device) const = 0;
  /// Work given to `stream` from now on waits for what the current stream has been given, and with
  /// `after` the other way round. Both handles are of `device`.
  virtual void order_streams(int device, uintptr_t stream, bool after) = 0;
  /// Page-locked host memory.
  virtual Allocation allocate_pinned(size_t nbytes) = 0;
  virtual bool is_pinned(const void* pointer) const = 0;
  /// The device that memory is on; -1 for memory that no device can use.
  virtual int device_of(const void* pointer) const = 0;
  /// Whether the op of a convolution's product (ops::_convolution and its gradients) has a kernel
  /// for these shapes at present; where not, convolutions are composed of other ops.
  virtual bool has_convolution(ConvolutionProduct, const Convolution&) { return false; }
  /// Waits for what the backend does in threads of its own, which ends by itself.
  virtual void before_fork() {}
  /// Ends what the backend does in threads of its own.
  virtual void finish() {}
};

/// The backend of an accelerator type, its library loaded on the first call; null (with the reason
/// in backend_problem) where it cannot be had.
DeviceBackend* backend_for(DeviceType type);
void set_backend(DeviceType type, DeviceBackend* backend);
/// Waits until threads of backends have no lock that a forked child would find held forever.
void before_fork();
/// Ends what backends do in threads of their own. To be called before the process lets go of what
/// such threads use: of libraries, and of the embedding language.
void finish_backends();
/// Why backend_for gives null or a backend has no device.
std::string backend_problem(DeviceType type);
/// The device with its index filled in: "cuda" is the thread's current one. Throws for a device
/// that does not exist, saying why.
Device resolve_device(Device device);

}  // namespace vt
