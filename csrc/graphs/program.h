// A captured step as a flat list of kernel calls: no Python, shape inference, autograd or
// allocation between them. On a device with graphs the calls are handed to it as one (lower); the
// host's own calls, such as those that count steps, then run before each launch.
#pragma once

#include <algorithm>
#include <vector>

#include "graphs/lowering.h"
#include "graphs/tape.h"

namespace vt::graphs {

class Program final : public RefCounted {
 public:
  /// Appends an op on these tensors. Outputs must have the recorded geometry.
  void add(const Call& call, TensorSpan inputs, TensorSpan outputs);
  /// Numbers that a run draws from the device's default generator.
  void draw(Device device, uint64_t counters);
  /// A tensor on the device that has, in each run, the values `host` has there between the calls
  /// added before and after. For programs that are lowered.
  Tensor upload(const Tensor& host, Device device);
  /// A copy that each run makes before its ops, into the memory of `place`, a tensor without gaps
  /// on the device, from where bind() says; or after them, from all bytes of a storage. Returns its
  /// number. For programs that are lowered.
  size_t copy_in(const Tensor& place);
  size_t copy_out(const Tensor& base);
  /// The other end of a copy in the next run, on the device; it must stay until that is done.
  /// Without it the run makes no such copy.
  void bind(size_t transfer, const void* address) { bound_[transfer] = address; }
  /// Hands the calls of the pool's device to it. The other calls must be the host's, and neither
  /// kind may use what the other writes, save by upload(). Nothing is added afterwards.
  void lower(Ref<Pool> pool);

  /// Runs everything once: in order on the calling thread, or, lowered, the host's calls and then
  /// the device's. Tensors that it writes count as changed in place.
  void run();
  /// Call before writing what a run reads: on a device the current stream then waits for earlier
  /// runs on other streams.
  void join() {
    std::fill(bound_.begin(), bound_.end(), nullptr);  // of a call that failed
    if (device_program_) device_program_->join();
  }
  /// Call after the current stream was given what reads the results of a run: later runs on other
  /// streams then wait for it.
  void extend() {
    if (device_program_) device_program_->extend();
  }
  /// Reserves the random numbers of a run; run() does it itself.
  void reserve();
  /// Runs one op of a program that is not lowered, with the numbers reserved last.
  void run_op(size_t index);

  size_t size() const { return instructions_.size(); }
  /// Bytes that go to the device with every run.
  size_t control_bytes() const { return control_bytes_; }
  /// What the device made of its calls; null for a program that is not lowered.
  const DeviceProgram* on_device() const { return device_program_.get(); }
  /// The op for which lower() failed; -1 if none is to blame.
  int64_t failed_op() const { return failed_op_; }
  /// Nodes of the device's graph by op: 0 for an op of the host. Empty if not lowered.
  std::vector<size_t> nodes() const;

 private:
  struct Draw {
    Device device;
    uint64_t counters;
  };
  /// A host tensor whose bytes go into the control block.
  struct Upload {
    Tensor host;
    size_t offset, nbytes;
    void copy_to(std::byte* control) const;
  };
  struct Step {
    bool is_upload;
    size_t index;  // of instructions_, or of uploads_
  };

  size_t add_transfer(const Tensor& place, size_t nbytes, bool before);
  void run_in_order();
  void run_lowered();
  void count_changes();
  void check_lowerable(const Instruction& instruction, Device device) const;

  std::vector<Instruction> instructions_;
  std::vector<Ref<Storage>> written_;  // that a run writes
  std::vector<Draw> draws_;
  std::vector<Upload> uploads_;
  std::vector<Transfer> transfers_;
  std::vector<const void*> bound_;  // their other ends in the next run
  std::vector<Step> steps_;         // in the order they were added; lowered, the host's
  Ref<Storage> control_;
  size_t control_bytes_ = 2 * sizeof(uint64_t);  // seed and offset come first
  PhiloxArgs drawn_;                             // what the device's calls draw from
  Device device_;
  std::vector<size_t> on_device_;  // the instructions that the device took over
  std::unique_ptr<DeviceProgram> device_program_;
  int64_t failed_op_ = -1;
};

}  // namespace vt::graphs
