// Argument parsing for the generated bindings: constant tables in, borrowed slots out.
#pragma once

#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "core/tensor.h"
#include "dispatch/value.h"
#include "python/python.h"
#include "python/tensor_type.h"

namespace vt::python {

inline constexpr int kMaxArgs = 32;

enum class ArgKind : uint8_t {
  Tensor,
  TensorOrScalar,
  TensorList,
  OptionalTensorList,
  Scalar,
  ScalarList,
  Int,
  Float,
  Bool,
  IntList,
  FloatList,
  DType,
  Device,
  Generator,
  Foreign,
  Str,
  MemoryFormat,
  Any,
};
enum ArgFlag : uint8_t {
  kKeywordOnly = 1,
  kHasDefault = 2,
  kNullable = 4,
  kVarArgs = 8,
  kRepeat = 16
};

struct ArgSpec {
  const char* name;
  ArgKind kind;
  int flags;
};

/// One overload.
class Signature {
 public:
  Signature(const char* text, std::span<const ArgSpec> specs) : text(text), specs(specs) {
    for (const ArgSpec& spec : specs) positional += (spec.flags & kKeywordOnly) == 0;
  }
  const char* text;
  std::span<const ArgSpec> specs;
  int positional = 0;
  PyObject* names[kMaxArgs] = {};  // interned, made at first use
};

/// Keeps what parsing had to build (the tuple behind varargs) until the call is over.
class ArgumentOwner {
 public:
  PyObject* keep(PyObject* owned) {
    object_ = Object(owned);
    return owned;
  }

 private:
  Object object_;
};

/// Finds the overload that fits and fills `slots` (null where the default applies). `self` is the
/// bound tensor or null. On failure sets TypeError with the accepted forms and returns -1.
int match(const char* name, std::span<Signature> signatures, PyObject* self, PyObject* const* args,
          Py_ssize_t nargs, PyObject* kwnames, PyObject** slots, ArgumentOwner& owner);

/// A tensor argument: borrowed from the caller, or owned when it had to be made (a number).
class TensorArg {
 public:
  TensorArg() = default;
  explicit TensorArg(const Tensor* borrowed) : borrowed_(borrowed) {}
  explicit TensorArg(Tensor owned) : owned_(std::move(owned)) {}
  operator const Tensor&() const { return borrowed_ ? *borrowed_ : owned_; }  // NOLINT
  const Tensor& get() const { return *this; }

 private:
  const Tensor* borrowed_ = nullptr;
  Tensor owned_;
};
class TensorListArg {
 public:
  std::vector<Tensor> items;
  operator TensorSpan() const { return items; }  // NOLINT
};
class IntListHolder : public Dims {
 public:
  using Dims::Dims;
};

/// The name of the object's class, for errors.
std::string type_name(PyObject* object);
TensorArg tensor_arg(PyObject* object);
TensorArg tensor_or_scalar_arg(PyObject* object);
TensorListArg tensor_list_arg(PyObject* object);
TensorListArg optional_tensor_list_arg(PyObject* object);
Scalar scalar_arg(PyObject* object);
std::vector<Scalar> scalar_list_arg(PyObject* object);
int64_t int_arg(PyObject* object);
double float_arg(PyObject* object);
bool bool_arg(PyObject* object);
/// A list, a tuple, or one int; with `repeat` > 1 a single int stands for that many.
IntListHolder int_list_arg(PyObject* object, int repeat);
std::vector<double> float_list_arg(PyObject* object);
DType dtype_arg(PyObject* object);
Device device_arg(PyObject* object);
/// As device_arg, but "cuda" keeps index -1: the current device at the time of use.
Device unresolved_device_arg(PyObject* object);
Generator generator_arg(PyObject* object);
/// A Python callable, which is called with a tuple of the tensors it may change and one of those it
/// reads.
Ref<ForeignFunction> foreign_arg(PyObject* object);
std::string_view str_arg(PyObject* object);
MemoryFormat memory_format_arg(PyObject* object);
bool is_number(PyObject* object);

/// Elements of work an op over these arguments does, for the decision to release the GIL.
/// A device's work is only issued here: what waits for it lets go of the GIL there (HostWait).
inline int64_t host_work(const Tensor& t) {
  return t.defined() && t.device().is_cpu() ? t.numel() : 0;
}
inline int64_t work_size() { return 0; }
template <class... Rest>
int64_t work_size(const TensorArg& first, const Rest&... rest) {
  const Tensor& t = first;
  return host_work(t) + work_size(rest...);
}
template <class... Rest>
int64_t work_size(const TensorListArg& first, const Rest&... rest) {
  int64_t total = 0;
  for (const Tensor& t : first.items) total += host_work(t);
  return total + work_size(rest...);
}

// Results.
inline PyObject* wrap(bool value) { return PyBool_FromLong(value); }
inline PyObject* wrap(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* wrap(double value) { return PyFloat_FromDouble(value); }
inline PyObject* wrap(DType value) { return wrap_dtype(value); }
PyObject* wrap(const Scalar& value);
PyObject* wrap(const std::vector<Tensor>& tensors);  // a tuple
PyObject* wrap_tuple(std::initializer_list<Tensor> tensors);
PyObject* wrap_named(const char* op, std::initializer_list<const char*> fields,
                     std::initializer_list<Tensor> tensors);
/// out=: resizes `out` if it is empty-handed or of another shape, copies, returns it. RuntimeError
/// if it or `result` has a gradient to compute.
PyObject* write_out(const char* op, PyObject* out, const Tensor& result);
PyObject* write_out_tuple(const char* op, PyObject* out, std::initializer_list<Tensor> results);
/// requires_grad= of factory functions (layout and pin_memory are accepted and have no effect on
/// CPU).
void apply_factory_options(const Tensor& result, PyObject* requires_grad);

// Boxed values and Python objects, for overrides, modes and the recorder.
PyObject* value_to_python(const Value& value);

}  // namespace vt::python
