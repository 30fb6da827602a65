// How a device takes over the kernel calls of a captured step. A backend registers how its device
// does that as its library loads; a step on the CPU runs as a list of calls (program.h).
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/kernel_switches.h"
#include "core/nvtx.h"
#include "dispatch/consumer.h"

namespace vt::graphs {

/// One kernel call, bound to its tensors.
struct Instruction {
  OpId id;
  std::vector<Value> args;
  std::vector<Tensor> outputs;
  int rng = -1;  // the argument that is a PhiloxArgs
  int64_t random_offset = 0;
  Device device;
  uint32_t switches = 0;  // core/kernel_switches.h: those under which it was recorded

  /// Calls the kernel; `arguments` in place of the call's own.
  void execute() const { execute(args); }
  void execute(const std::vector<Value>& arguments) const {
    const KernelSwitchesAs as_recorded(switches);
    execute_as_is(arguments);
  }
  /// The same where the switches are set already.
  void execute_as_is() const { execute_as_is(args); }
  void execute_as_is(const std::vector<Value>& arguments) const {
    const nvtx::OpRange range(op_name(id));
    execute_kernel(id, arguments, outputs);
  }
};

/// A pool's name, as the device's allocator has it; {0, 0} is none.
struct PoolHandle {
  uint64_t first = 0, second = 0;
  friend bool operator==(const PoolHandle&, const PoolHandle&) = default;
};

/// Device memory of captured steps: nothing else is allocated from it while one of them lives.
/// Steps that share a pool may use the same bytes for their intermediates, so they run one after
/// another.
class Pool : public RefCounted {
 public:
  explicit Pool(Device device) : device_(device) {}
  Device device() const { return device_; }
  virtual PoolHandle handle() const = 0;
  virtual Allocation allocate(size_t nbytes) = 0;
  /// Memory for the intermediates of one step, shared with the steps that asked before if it is
  /// large enough.
  virtual Ref<Storage> arena(size_t nbytes) = 0;

 private:
  Device device_;
};

/// Memory that a run copies besides its calls: before them into `place`, from where a caller's
/// tensor lies, or after them out of it, to where a result is wanted.
struct Transfer {
  Tensor place;  // of the device; its bytes lie in one piece
  size_t nbytes;
  size_t address;  // where the control block has the other end; null there: this run copies nothing
  bool before;
};

/// Kernel calls that a device has taken over. Any thread may drop it, also while a run is under
/// way: what the run uses lives on until it is done.
class DeviceProgram {
 public:
  virtual ~DeviceProgram() = default;
  /// What the calling thread's current stream is given from now on comes after earlier runs, on
  /// whatever stream, of all programs that share the memory.
  virtual void join() = 0;
  /// Host memory for what the next run is told, as large as the control block; the same until
  /// launch(). May wait for an earlier run. Throws if a run is impossible, as when memory that the
  /// calls are bound to has moved.
  virtual std::byte* control() = 0;
  /// Brings the control block to the device and starts a run on the current stream.
  virtual void launch() = 0;
  /// What the current stream was given since the last run, such as copies of its results, belongs
  /// to it: join() waits for that too.
  virtual void extend() = 0;
  /// How many nodes of the device's graph each call became.
  virtual std::vector<size_t> nodes() const = 0;
  /// How many nodes of each kind the graph has: "kernel", "memset", "memcpy", "other".
  virtual std::map<std::string, size_t> node_kinds() const = 0;
  /// Writes the device's graph as a DOT file, as its driver shows it.
  virtual void dump(const std::string& path) const = 0;
};

/// A call that a device cannot take over. The message names its op.
class CallError : public Error {
 public:
  CallError(ErrorKind kind, std::string message, size_t call)
      : Error(kind, std::move(message)), call_(call) {}
  /// Which of the calls.
  size_t call() const { return call_; }

 private:
  size_t call_;
};

class Lowering {
 public:
  virtual ~Lowering() = default;
  /// The pool of that name, or a new one.
  virtual Ref<Pool> pool(Device device, PoolHandle wanted) = 0;
  /// Takes over the calls, in order, and the transfers around them; none of them runs. Random ones
  /// draw from {seed, offset} at the start of `control`, whose bytes are replaced at every launch.
  /// If a call cannot be taken over this throws CallError, and streams, pools and random numbers
  /// are as before.
  virtual std::unique_ptr<DeviceProgram> lower(std::vector<Instruction> calls,
                                               std::vector<Transfer> transfers,
                                               Ref<Storage> control, Ref<Pool> pool) = 0;
  /// Why the device has no kernels for chains of pointwise ops (_fused_pointwise); empty if it has.
  virtual std::string chains_problem() { return {}; }
};

/// Called by a backend as it loads; the lowering must outlive the process.
void set_lowering(DeviceType type, Lowering* lowering);
/// Throws where the type has none: its calls run one by one.
Lowering& lowering_for(DeviceType type);

}  // namespace vt::graphs
