// Which calls of a captured function belong to one key of graphs/capture.py: the same structure of
// arguments, geometries, constants and modes. It may know less than the key does, never more: a
// call that it does not recognise goes the long way.
#pragma once

#include <memory>

#include "core/tensor.h"
#include "python/structure.h"

namespace vt::python {

/// What NumPy's __array_struct__ points to.
struct ArrayStruct {
  int two, dimensions;
  char kind;
  int item_size, flags;
  Py_ssize_t *shape, *strides;
  void* data;
  PyObject* description;
};

/// Where an argument's values lie, for the length of a call.
struct Argument {
  Object object;
  Object capsule;  // keeps an array's memory
  const ArrayStruct* array = nullptr;
};
using Arguments = SmallVector<Argument, 8>;

class CallKey {
 public:
  /// Of a call with these leaves, in the modes that the thread is in. Null where an argument is of
  /// a kind that only the key can tell apart.
  static std::unique_ptr<CallKey> make(PyObject* spec, PyObject* leaves);

  /// Whether a call is the same; `arguments` are its leaves then.
  bool matches(PyObject* args, PyObject* kwargs, Arguments& arguments) const;

  int traverse(visitproc visit, void* arg) const;

 private:
  struct Modes {
    bool grad, inference;
    uint8_t autocast, autocast_dtypes[2];
    DType default_dtype;
    Device default_device;
    uint32_t switches;  // core/kernel_switches.h

    static Modes now();
    bool operator==(const Modes&) const = default;
  };
  struct Leaf {
    enum class Kind : uint8_t { Tensor, Trained, Array, Constant } kind = Kind::Constant;
    Object value;      // a constant, a tensor that is used as it is, the type of an array
    size_t first = 0;  // the first leaf on the same storage
    size_t twin = 0;   // the first that is the same tensor there: they are one copy
    Dims sizes, strides;
    DType dtype = DType::Float32;
    Device device;
    char array_kind = 0;
    int item_size = 0;
  };

  static bool describe(PyObject* object, Leaf& leaf);
  static bool accepts(const Leaf& leaf, Argument& argument);
  bool same_aliases(const Leaves& leaves) const;
  bool same_twin(const Leaves& leaves, size_t at) const;

  Structure structure_;
  Modes modes_{};
  std::vector<Leaf> leaves_;
};

}  // namespace vt::python
