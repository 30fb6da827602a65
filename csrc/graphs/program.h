// A captured step as a flat list of kernel calls: no Python, shape inference, autograd or
// allocation between them.
#pragma once

#include <vector>

#include "graphs/tape.h"

namespace vt::graphs {

class Program final : public RefCounted {
 public:
  /// Appends an op on these tensors. Outputs must have the recorded geometry.
  void add(const Call& call, TensorSpan inputs, TensorSpan outputs);
  /// Numbers that a run draws from the device's default generator.
  void draw(Device device, uint64_t counters);
  /// Runs everything once, in order, on the calling thread. Tensors that it writes count as changed
  /// in place.
  void run();
  /// Reserves the random numbers of a run; run() does it itself.
  void reserve();
  /// Runs one op, with the numbers reserved last.
  void run_op(size_t index);
  size_t size() const { return instructions_.size(); }

 private:
  struct Instruction {
    OpId id;
    std::vector<Value> args;
    std::vector<Tensor> outputs;
    int rng = -1;  // the argument that is a PhiloxArgs
    int64_t random_offset = 0;
    Device device;
  };
  struct Draw {
    Device device;
    uint64_t counters;
  };

  std::vector<Instruction> instructions_;
  std::vector<Tensor> written_;  // one a storage that a run writes
  std::vector<Draw> draws_;
};

}  // namespace vt::graphs
