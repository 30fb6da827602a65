// A captured step's replay without Python code: match the call, check what the capture relies on,
// copy inputs, read learning rates, run, give out results and gradients. It does what
// graphs/capture.py does (_enter, host acts, _leave) where nothing is out of the ordinary, and
// leaves the call to it where something is.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "graphs/memory.h"
#include "graphs/program.h"
#include "python/call_key.h"
#include "python/watch.h"

namespace vt::python {

/// One captured course.
class Replay {
 public:
  /// The parts of a Variant in graphs/capture.py; see the binding.
  struct Parts {
    Object program, guard, course, tensors;
    Object inputs;     // a tensor to copy into, or None, for each leaf of the arguments
    Object transfers;  // for each of them the number of the program's own copy into it, or -1
    Object acts;       // (group, live tensor) of a learning rate, or something to call
    Object outputs;    // (loan, geometry), or (None, the result itself)
    Object structure;  // of the results
    Object build;      // makes them of a list of leaves, where the structure is of a rare kind
    Object gradients;  // (leaf, .grad that is read or None, .grad that is left or None)
    Object found;      // (leaf, whether it had a .grad at the start)
    Object apart;      // for each of the inputs the tensors in whose memory no argument may lie
  };
  explicit Replay(const Parts& parts);
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// Whether Python would decide again as it did and every tensor is where it was.
  bool holds();
  /// Whether the same leaves have a gradient as did when it was recorded.
  bool gradients_as_found() const;
  /// Whether the gradients that the step reads are the tensors it is bound to.
  bool gradients_in_place() const;
  /// Whether the argument does not lie where its copy would not do.
  bool stands_apart(size_t index, PyObject* argument) const;
  Object run(const Arguments& arguments);
  /// Of a block without arguments and results, replayed where everything lies: false, and nothing
  /// is done, where something is not as it was.
  bool run_in_place();

  int64_t count() const { return count_; }
  /// Grows with each use of any of them: tells which was used longest ago.
  uint64_t last_used() const { return last_used_; }
  void touch();
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Act {
    Object group;  // whose learning rate or momentum goes into `live`; or something to call
    Tensor live;
    Object name;  // of the option
  };
  struct Output {
    Object object;       // the loan; a tensor that was there before the step, or a constant
    graphs::Loan* loan;  // null for the latter two
    int64_t byte_offset;
    DType dtype;
    Dims sizes, strides;
  };
  struct Gradient {
    Tensor leaf, start, end;
  };

  void launch();
  void stage(const Argument& argument, const Tensor& target, int64_t transfer) const;
  void perform(const Act& act) const;
  Object results() const;

  std::vector<Object> kept_;  // what the pointers point into
  graphs::Program* program_;
  graphs::Guard* guard_;
  Watch *course_, *tensors_;
  Object build_;
  std::vector<Tensor> inputs_;
  std::vector<int64_t> transfers_;
  std::vector<std::vector<const Storage*>> apart_;  // in order; the guard's tensors have them
  std::vector<Act> acts_;
  std::vector<Output> outputs_;
  std::vector<graphs::Loan*> loans_;
  bool copies_after_ = false;  // results that the program does not copy itself
  std::vector<Gradient> gradients_;
  struct Found {
    Ref<TensorImpl> leaf;
    bool has_grad;
  };
  std::vector<Found> found_;
  std::optional<Structure> structure_;
  int64_t count_ = 0;
  uint64_t last_used_ = 0;
};

/// All courses of a captured function by the calls they belong to; those used last come first.
class Replays {
 public:
  Replays() = default;
  Replays(const Replays&) = delete;
  Replays& operator=(const Replays&) = delete;
  /// In the order in which they are to be tried. False where only Python can tell the calls apart.
  bool add(PyObject* spec, PyObject* leaves, std::vector<Object> replays);
  void clear();
  /// The result, or null where the call is not one of those.
  Object run(PyObject* args, PyObject* kwargs);
  /// What ran last, or null.
  const Object& last() const { return last_; }
  void forget_last() { last_ = Object(); }
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Entry {
    std::unique_ptr<CallKey> key;
    std::vector<Object> replays;
  };
  std::vector<std::shared_ptr<const Entry>> entries_;
  Object last_;
};

}  // namespace vt::python
