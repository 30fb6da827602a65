#include "python/arguments.h"

#include <cstring>
#include <map>
#include <string>

#include "autograd/front.h"
#include "core/device_backend.h"
#include "python/foreign.h"
#include "vt/ops.h"

namespace vt::python {
namespace {

/// Keeps the tensor: reading from a device lets other threads run, which may drop `object`.
Scalar item_of(PyObject* object) {
  const Tensor t = tensor_of(object);
  return t.item();
}

bool is_sequence(PyObject* object) { return PyTuple_Check(object) || PyList_Check(object); }

Py_ssize_t sequence_size(PyObject* object) {
  return PyTuple_Check(object) ? PyTuple_Size(object) : PyList_Size(object);
}
/// Borrowed.
PyObject* sequence_item(PyObject* object, Py_ssize_t i) {
  return PyTuple_Check(object) ? PyTuple_GetItem(object, i) : PyList_GetItem(object, i);
}

bool is_int_like(PyObject* object) {
  if (PyLong_Check(object)) return !PyBool_Check(object);
  if (PyFloat_Check(object) || PyUnicode_Check(object)) return false;
  if (is_tensor(object)) {
    const Tensor& t = tensor_of(object);
    return t.numel() == 1 && t.dim() == 0 && is_integral(t.dtype(), true) && !is_sequence(object);
  }
  return PyIndex_Check(object);
}

bool is_int_list(PyObject* object) {
  if (!is_sequence(object)) return false;
  const Py_ssize_t n = sequence_size(object);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = sequence_item(object, i);
    if (!is_int_like(item) && !PyBool_Check(item)) return false;
  }
  return true;
}

bool all_tensors(PyObject* object, bool allow_none) {
  if (!is_sequence(object)) return false;
  const Py_ssize_t n = sequence_size(object);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = sequence_item(object, i);
    if (!is_tensor(item) && !(allow_none && item == Py_None)) return false;
  }
  return true;
}

bool accepts(const ArgSpec& spec, PyObject* object) {
  if (object == Py_None) return (spec.flags & kNullable) != 0;
  switch (spec.kind) {
    case ArgKind::Tensor:
      return is_tensor(object);
    case ArgKind::TensorOrScalar:
      return is_tensor(object) || is_number(object);
    case ArgKind::TensorList:
      return all_tensors(object, false);
    case ArgKind::OptionalTensorList:
      return all_tensors(object, true);
    case ArgKind::Scalar:
      return is_number(object) || (is_tensor(object) && tensor_of(object).dim() == 0);
    case ArgKind::ScalarList:
    case ArgKind::FloatList:
      return is_sequence(object);
    case ArgKind::Int:
      return is_int_like(object);
    case ArgKind::Float:
      return is_number(object) || (is_tensor(object) && tensor_of(object).dim() == 0);
    case ArgKind::Bool:
      return PyBool_Check(object) ||
             (!PyLong_Check(object) && !PyFloat_Check(object) && !is_tensor(object) &&
              !is_sequence(object) && !PyUnicode_Check(object) && is_number(object));
    case ArgKind::IntList:
      return is_int_like(object) || is_int_list(object);
    case ArgKind::DType:
      return is_dtype(object) || PyType_Check(object);
    case ArgKind::Device:
      return is_device(object) || PyUnicode_Check(object) || is_int_like(object);
    case ArgKind::Generator:
      return PyType_IsSubtype(Py_TYPE(object), generator_type);
    case ArgKind::Foreign:
      return PyCallable_Check(object) != 0;
    case ArgKind::Str:
      return PyUnicode_Check(object);
    case ArgKind::MemoryFormat:
      return PyType_IsSubtype(Py_TYPE(object), memory_format_type);
    case ArgKind::Any:
      return true;
  }
  return false;
}

const char* kind_name(const ArgSpec& spec) {
  switch (spec.kind) {
    case ArgKind::Tensor:
      return "Tensor";
    case ArgKind::TensorOrScalar:
      return "Tensor or Number";
    case ArgKind::TensorList:
    case ArgKind::OptionalTensorList:
      return "tuple of Tensors";
    case ArgKind::Scalar:
      return "Number";
    case ArgKind::ScalarList:
      return "tuple of Numbers";
    case ArgKind::Int:
      return "int";
    case ArgKind::Float:
      return "float";
    case ArgKind::Bool:
      return "bool";
    case ArgKind::IntList:
      return "tuple of ints";
    case ArgKind::FloatList:
      return "tuple of floats";
    case ArgKind::DType:
      return "torch.dtype";
    case ArgKind::Device:
      return "torch.device";
    case ArgKind::Generator:
      return "Generator";
    case ArgKind::Foreign:
      return "callable";
    case ArgKind::Str:
      return "str";
    case ArgKind::MemoryFormat:
      return "torch.memory_format";
    case ArgKind::Any:
      return "object";
  }
  return "object";
}

void intern_names(Signature& signature) {
  for (size_t i = 0; i < signature.specs.size(); ++i) {
    signature.names[i] = checked(PyUnicode_InternFromString(signature.specs[i].name));
  }
}

/// NumPy's and torch's other spellings of a keyword.
std::string_view canonical(std::string_view keyword) {
  if (keyword == "axis") return "dim";
  if (keyword == "keepdims") return "keepdim";
  if (keyword == "input") return "self";
  return keyword;
}

int find_keyword(const Signature& signature, PyObject* keyword) {
  const size_t n = signature.specs.size();
  for (size_t i = 0; i < n; ++i) {
    if (signature.names[i] == keyword) return static_cast<int>(i);
  }
  const char* text = PyUnicode_AsUTF8AndSize(keyword, nullptr);
  if (!text) throw PythonError();
  const std::string_view name = canonical(text);
  for (size_t i = 0; i < n; ++i) {
    if (name == signature.specs[i].name) return static_cast<int>(i);
  }
  return -1;
}

/// Tries one overload; with `why`, explains a mismatch there.
bool try_match(Signature& signature, PyObject* self, PyObject* const* args, Py_ssize_t nargs,
               PyObject* kwnames, PyObject** slots, ArgumentOwner& owner, std::string* why) {
  const int count = static_cast<int>(signature.specs.size());
  if (count > 0 && !signature.names[0]) intern_names(signature);
  int at = 0;
  if (self) slots[at++] = self;
  Py_ssize_t given = 0;
  for (; at < signature.positional && given < nargs; ++at) {
    const ArgSpec& spec = signature.specs[at];
    PyObject* object = args[given];
    if ((spec.flags & kVarArgs) && (nargs - given > 1 || !is_sequence(object)) &&
        is_int_like(object)) {
      bool ints = true;
      for (Py_ssize_t i = given; i < nargs; ++i) ints &= is_int_like(args[i]);
      if (!ints) {
        if (why) *why = str("argument '", spec.name, "' must be tuple of ints");
        return false;
      }
      PyObject* tuple = owner.keep(checked(PyTuple_New(nargs - given)));
      for (Py_ssize_t i = given; i < nargs; ++i)
        PyTuple_SetItem(tuple, i - given, new_reference(args[i]));
      slots[at] = tuple;
      given = nargs;
      continue;
    }
    if (!accepts(spec, object)) {
      if (why) {
        *why = str("argument '", spec.name, "' (position ", given + 1, ") must be ",
                   kind_name(spec), ", not ", type_name(object));
      }
      return false;
    }
    slots[at] = object == Py_None && spec.kind != ArgKind::Any ? nullptr : object;
    ++given;
  }
  if (given < nargs) {
    if (why) {
      *why = str("takes ", signature.positional, " positional arguments but ",
                 nargs + (self ? 1 : 0), " were given");
    }
    return false;
  }
  const int filled = at;
  for (; at < count; ++at) slots[at] = nullptr;
  uint32_t seen = 0;
  if (kwnames) {
    const Py_ssize_t n = PyTuple_Size(kwnames);
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* keyword = PyTuple_GetItem(kwnames, i);
      const int index = find_keyword(signature, keyword);
      if (index < 0) {
        if (why)
          *why = str("got an unexpected keyword argument '",
                     PyUnicode_AsUTF8AndSize(keyword, nullptr), "'");
        return false;
      }
      if (index < filled) {
        if (why) *why = str("got multiple values for argument '", signature.specs[index].name, "'");
        return false;
      }
      PyObject* object = args[nargs + i];
      if (!accepts(signature.specs[index], object)) {
        if (why) {
          *why = str("argument '", signature.specs[index].name, "' must be ",
                     kind_name(signature.specs[index]), ", not ", type_name(object));
        }
        return false;
      }
      slots[index] = object == Py_None ? nullptr : object;
      seen |= 1u << index;
    }
  }
  for (int i = filled; i < count; ++i) {
    if (!slots[i] && !(seen >> i & 1) && !(signature.specs[i].flags & kHasDefault)) {
      if (why) *why = str("missing required argument: \"", signature.specs[i].name, "\"");
      return false;
    }
  }
  return true;
}

}  // namespace

int match(const char* name, std::span<Signature> signatures, PyObject* self, PyObject* const* args,
          Py_ssize_t nargs, PyObject* kwnames, PyObject** slots, ArgumentOwner& owner) {
  for (size_t i = 0; i < signatures.size(); ++i) {
    if (try_match(signatures[i], self, args, nargs, kwnames, slots, owner, nullptr))
      return static_cast<int>(i);
  }
  std::string message = str(name, "()");
  if (signatures.size() == 1) {
    std::string why;
    try_match(signatures[0], self, args, nargs, kwnames, slots, owner, &why);
    message += ": " + why;
  } else {
    message += " received an invalid combination of arguments - got (";
    for (Py_ssize_t i = 0; i < nargs; ++i) message += (i ? ", " : "") + type_name(args[i]);
    if (kwnames) {
      for (Py_ssize_t i = 0; i < PyTuple_Size(kwnames); ++i) {
        message += str(nargs + i ? ", " : "",
                       PyUnicode_AsUTF8AndSize(PyTuple_GetItem(kwnames, i), nullptr), "=",
                       type_name(args[nargs + i]));
      }
    }
    message += "), but expected one of:";
    for (const Signature& signature : signatures) message += str("\n * ", signature.text);
  }
  PyErr_SetString(PyExc_TypeError, message.c_str());
  return -1;
}

bool is_number(PyObject* object) {
  if (PyLong_Check(object) || PyFloat_Check(object)) return true;
  if (is_tensor(object) || PyUnicode_Check(object) || is_sequence(object) || object == Py_None)
    return false;
  // NumPy scalars: numbers with no length.
  return PyNumber_Check(object) && PyObject_HasAttrString(object, "dtype") &&
         PyObject_Size(object) < 0 && (PyErr_Clear(), true);
}

std::string type_name(PyObject* object) {
  const Object name(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
  const char* text = name ? PyUnicode_AsUTF8AndSize(name.get(), nullptr) : nullptr;
  return text ? text : "object";
}

TensorArg tensor_arg(PyObject* object) {
  return object ? TensorArg(&tensor_of(object)) : TensorArg();
}
TensorArg tensor_or_scalar_arg(PyObject* object) {
  if (!object) return TensorArg();
  if (is_tensor(object)) return TensorArg(&tensor_of(object));
  return TensorArg(wrapped_scalar(scalar_arg(object)));
}
TensorListArg tensor_list_arg(PyObject* object) { return optional_tensor_list_arg(object); }
TensorListArg optional_tensor_list_arg(PyObject* object) {
  TensorListArg out;
  if (!object) return out;
  const Py_ssize_t n = sequence_size(object);
  out.items.reserve(static_cast<size_t>(n));
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = sequence_item(object, i);
    out.items.push_back(item == Py_None ? Tensor() : tensor_of(item));
  }
  return out;
}

Scalar scalar_arg(PyObject* object) {
  if (PyFloat_Check(object)) return PyFloat_AsDouble(object);
  if (PyBool_Check(object)) return object == Py_True;
  if (PyLong_Check(object)) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0)
      fail(ErrorKind::Overflow, "value cannot be converted to type int64_t without overflow");
    return value;
  }
  if (is_tensor(object)) return item_of(object);
  if (PyIndex_Check(object)) {
    if (const Object index(PyNumber_Index(object)); index) return scalar_arg(index.get());
    // An array of no dimensions has __index__, and refuses it unless it is an integer.
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw PythonError();
    PyErr_Clear();
  }
  const std::string name = type_name(object);
  if (name == "bool" || name == "bool_") return PyObject_IsTrue(object) == 1;
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  return value;
}
std::vector<Scalar> scalar_list_arg(PyObject* object) {
  std::vector<Scalar> out;
  for (Py_ssize_t i = 0; object && i < sequence_size(object); ++i)
    out.push_back(scalar_arg(sequence_item(object, i)));
  return out;
}
int64_t int_arg(PyObject* object) {
  if (is_tensor(object)) return item_of(object).to_int();
  const Object index = PyLong_Check(object) ? Object::borrow(object) : own(PyNumber_Index(object));
  const int64_t value = PyLong_AsLongLong(index.get());
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}
double float_arg(PyObject* object) {
  if (is_tensor(object)) return item_of(object).to_double();
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  return value;
}
bool bool_arg(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw PythonError();
  return truth != 0;
}
IntListHolder int_list_arg(PyObject* object, int repeat) {
  IntListHolder out;
  if (!is_sequence(object)) {
    const int64_t value = int_arg(object);
    for (int i = 0; i < std::max(repeat, 1); ++i) out.push_back(value);
    return out;
  }
  const Py_ssize_t n = sequence_size(object);
  for (Py_ssize_t i = 0; i < n; ++i) out.push_back(int_arg(sequence_item(object, i)));
  if (repeat > 1 && n == 1) {
    while (out.size() < static_cast<size_t>(repeat)) out.push_back(out[0]);
  }
  return out;
}
std::vector<double> float_list_arg(PyObject* object) {
  std::vector<double> out;
  for (Py_ssize_t i = 0; object && i < sequence_size(object); ++i)
    out.push_back(float_arg(sequence_item(object, i)));
  return out;
}
DType dtype_arg(PyObject* object) {
  if (is_dtype(object)) return dtype_of(object);
  if (object == reinterpret_cast<PyObject*>(&PyFloat_Type)) return DType::Float64;
  if (object == reinterpret_cast<PyObject*>(&PyLong_Type)) return DType::Int64;
  if (object == reinterpret_cast<PyObject*>(&PyBool_Type)) return DType::Bool;
  fail(ErrorKind::Type, "dtype must be torch.dtype, not ", type_name(object));
}
Device unresolved_device_arg(PyObject* object) {
  return is_device(object)         ? device_of(object)
         : PyUnicode_Check(object) ? parse_device(str_arg(object))
                                   : parse_device(str("cuda:", int_arg(object)));
}
Device device_arg(PyObject* object) {
  const Device device = unresolved_device_arg(object);
  return device.is_cpu() ? device : resolve_device(device);
}
Generator generator_arg(PyObject* object) { return generator_of(object); }
std::string_view str_arg(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (!text) throw PythonError();
  return {text, static_cast<size_t>(size)};
}
MemoryFormat memory_format_arg(PyObject* object) { return memory_format_of(object); }

PyObject* wrap(const Scalar& value) {
  if (value.is_bool()) return wrap(value.to_bool());
  if (value.is_int()) return wrap(value.to_int());
  return wrap(value.to_double());
}
PyObject* wrap(const std::vector<Tensor>& tensors) {
  Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), checked(wrap(tensors[i])));
  }
  return tuple.release();
}
PyObject* wrap_tuple(std::initializer_list<Tensor> tensors) {
  return wrap(std::vector<Tensor>(tensors));
}

PyObject* wrap_named(const char* op, std::initializer_list<const char*> fields,
                     std::initializer_list<Tensor> tensors) {
  static auto* types = new std::map<std::string, PyTypeObject*>;
  std::string key = op;
  for (const char* field : fields) key += str('.', field);
  PyTypeObject*& type = (*types)[key];
  if (!type) {
    auto* members = new PyStructSequence_Field[fields.size() + 1]();
    size_t i = 0;
    for (const char* field : fields) members[i++].name = field;
    auto* name = new std::string(str("vibetensor.return_types.", op));
    PyStructSequence_Desc desc{name->c_str(), nullptr, members, static_cast<int>(fields.size())};
    type = PyStructSequence_NewType(&desc);
    if (!type) throw PythonError();
    const Object printing = own(PyImport_ImportModule("vibetensor.torch._tensor_str"));
    const Object repr = own(PyObject_GetAttrString(printing.get(), "named_tuple_str"));
    if (PyObject_SetAttrString(reinterpret_cast<PyObject*>(type), "__repr__", repr.get()) < 0)
      throw PythonError();
  }
  Object result = own(PyStructSequence_New(type));
  Py_ssize_t i = 0;
  for (const Tensor& t : tensors) PyStructSequence_SetItem(result.get(), i++, checked(wrap(t)));
  return result.release();
}

namespace {

/// What torch refuses: neither `out` nor what `result` depends on may want a gradient.
void check_out(const char* op, PyObject* out, const Tensor& result) {
  check_type(is_tensor(out), op, "(): argument 'out' must be Tensor, not ", type_name(out));
  const Tensor& target = tensor_of(out);
  check(!autograd::should_record(target, result), op,
        "(): functions with out=... arguments don't support automatic differentiation, but one of "
        "the arguments requires grad.");
  check(can_cast(result.dtype(), target.dtype()), "result type ", result.dtype(),
        " can't be cast to the desired output type ", target.dtype());
}

void write(const Tensor& target, const Tensor& result) {
  const NoGrad no_grad;
  if (!equal(target.sizes(), result.sizes())) ops::resize_(target, result.sizes(), std::nullopt);
  ops::copy_(target, result, false);
}

}  // namespace

PyObject* write_out(const char* op, PyObject* out, const Tensor& result) {
  check_out(op, out, result);
  write(tensor_of(out), result);
  return new_reference(out);
}
PyObject* write_out_tuple(const char* op, PyObject* out, std::initializer_list<Tensor> results) {
  check_type(is_sequence(out) && sequence_size(out) == static_cast<Py_ssize_t>(results.size()), op,
             "(): argument 'out' must be a tuple of ", results.size(), " Tensors");
  Py_ssize_t i = 0;
  for (const Tensor& result : results) check_out(op, sequence_item(out, i++), result);
  i = 0;
  for (const Tensor& result : results) write(tensor_of(sequence_item(out, i++)), result);
  return new_reference(out);
}

void apply_factory_options(const Tensor& result, PyObject* requires_grad) {
  if (!requires_grad || !bool_arg(requires_grad)) return;
  check(is_floating(result.dtype()),
        "Only Tensors of floating point and complex dtype can require gradients");
  result.impl()->requires_grad = true;
}

PyObject* value_to_python(const Value& value) {
  return std::visit(
      [](const auto& v) -> PyObject* {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::monostate>)
          return none();
        else if constexpr (std::is_same_v<T, std::vector<int64_t>>)
          return wrap_ints(v);
        else if constexpr (std::is_same_v<T, std::string>) {
          return checked(PyUnicode_FromStringAndSize(v.data(), static_cast<Py_ssize_t>(v.size())));
        } else if constexpr (std::is_same_v<T, Device>)
          return wrap_device(v);
        else if constexpr (std::is_same_v<T, MemoryFormat>)
          return wrap_memory_format(v);
        else if constexpr (std::is_same_v<T, Generator>)
          return wrap_generator(v);
        else if constexpr (std::is_same_v<T, Ref<ForeignFunction>>)
          return foreign_callable(*v);
        else if constexpr (std::is_same_v<T, PhiloxArgs>) {
          return checked(Py_BuildValue("(KK)", static_cast<unsigned long long>(v.seed),
                                       static_cast<unsigned long long>(v.offset)));
        } else if constexpr (std::is_same_v<T, std::vector<double>> ||
                             std::is_same_v<T, std::vector<Scalar>>) {
          Object list = own(PyList_New(0));
          for (const auto& item : v) {
            const Object boxed = own(wrap(item));
            if (PyList_Append(list.get(), boxed.get()) < 0) throw PythonError();
          }
          return list.release();
        } else {
          return wrap(v);
        }
      },
      value);
}

}  // namespace vt::python
