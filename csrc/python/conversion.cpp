// Tensors from and to Python data: nested lists, buffers, NumPy arrays, DLPack capsules.
#include <cstring>

#include "autograd/front.h"
#include "core/device_backend.h"
#include "core/storage_observer.h"
#include "dispatch/consumer.h"
#include "dispatch/default_device.h"
#include "io/dlpack.h"
#include "python/arguments.h"
#include "python/array_interface.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace vt::python {
namespace {

bool is_sequence(PyObject* object) { return PyTuple_Check(object) || PyList_Check(object); }

/// A sequence of another class: range, deque, array.array. Text is none.
bool is_other_sequence(PyObject* object) {
  return PySequence_Check(object) && !PyUnicode_Check(object) && !PyBytes_Check(object) &&
         !is_sequence(object) && !is_tensor(object) && !has_array_interface(object);
}

Tensor copy_of(const Tensor& t) {
  Tensor out = empty(t.sizes(), t.dtype(), t.device());
  ops::copy_(out, t, false);
  return out;
}

// --- torch.tensor(data)

/// Shape and common element type of nested lists.
struct Shape {
  Dims sizes;
  DType dtype = DType::Bool;
  bool any = false;
  bool other_sequences = false;  // one was found: the rest was not looked at
};

/// The dtype of a scalar of NumPy's; none for other objects, of Python's own float, int and bool
/// too.
std::optional<DType> numpy_scalar_dtype(PyObject* item) {
  static auto* known = new std::vector<std::pair<PyTypeObject*, DType>>;
  for (const auto& [type, dtype] : *known) {
    if (type == Py_TYPE(item)) return dtype;
  }
  if (!has_array_interface(item)) return std::nullopt;
  const DType dtype = from_array_interface(item).dtype();
  // numpy.ndarray's differ in dtype; a type of scalars, which lives as long as NumPy, has one.
  if (!is_ndarray(item)) {
    Py_INCREF(reinterpret_cast<PyObject*>(Py_TYPE(item)));
    known->push_back({Py_TYPE(item), dtype});
  }
  return dtype;
}

void note_scalar(Shape& shape, PyObject* item) {
  DType dtype;
  if (PyBool_Check(item))
    dtype = DType::Bool;
  else if (PyFloat_CheckExact(item))
    dtype = default_dtype();
  else if (PyLong_CheckExact(item))
    dtype = DType::Int64;
  else if (const auto numpy = is_tensor(item) ? std::nullopt : numpy_scalar_dtype(item))
    dtype = *numpy;
  else if (PyFloat_Check(item))
    dtype = default_dtype();
  else if (PyLong_Check(item))
    dtype = DType::Int64;
  else if (is_tensor(item))
    dtype = tensor_of(item).dtype();
  else if (PyIndex_Check(item))
    dtype = DType::Int64;
  else if (is_number(item))
    dtype = default_dtype();
  else if (PyUnicode_Check(item) || PyBytes_Check(item))
    fail(ErrorKind::Type, "new(): invalid data type '", type_name(item), "'");
  else
    fail(ErrorKind::Runtime, "Could not infer dtype of ", type_name(item),
         ": data must be numbers, sequences of them, arrays or tensors");
  shape.dtype = shape.any ? promote_types(shape.dtype, dtype) : dtype;
  shape.any = true;
}

void scan(PyObject* data, Shape& shape, size_t depth) {
  if (shape.other_sequences) return;
  if (!PyList_Check(data) && !PyTuple_Check(data)) {
    // Numbers are asked about first: there are many of them.
    if (!PyFloat_Check(data) && !PyLong_Check(data) && is_other_sequence(data)) {
      shape.other_sequences = true;
      return;
    }
    if (is_tensor(data) && tensor_of(data).dim() > 0) {
      check_value(tensor_of(data).numel() == 1,
                  "only one element tensors can be converted to Python scalars");
    }
    check_value(depth == shape.sizes.size(), "expected sequence of length ",
                depth < shape.sizes.size() ? shape.sizes[depth] : 0, " at dim ", depth,
                " (got a number)");
    note_scalar(shape, data);
    return;
  }
  const bool list = PyList_Check(data);
  const Py_ssize_t n = list ? PyList_Size(data) : PyTuple_Size(data);
  if (depth == shape.sizes.size() && !shape.any) {
    check_value(depth < kMaxDims, "too many dimensions: a tensor has at most ", kMaxDims);
    shape.sizes.push_back(n);
  }
  check_value(depth < shape.sizes.size() && shape.sizes[depth] == n, "expected sequence of length ",
              depth < shape.sizes.size() ? shape.sizes[depth] : 0, " at dim ", depth, " (got ",
              int64_t{n}, ")");
  for (Py_ssize_t i = 0; i < n; ++i)
    scan(list ? PyList_GetItem(data, i) : PyTuple_GetItem(data, i), shape, depth + 1);
}

/// An int of any size as a floating type's nearest value.
template <class T>
T from_int(PyObject* number) {
  if constexpr (std::is_floating_point_v<T>) {
    const double value = PyLong_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred()) throw PythonError();
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    return PyObject_IsTrue(number) == 1;
  } else {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    check_value(overflow == 0,
                "Overflow when unpacking long long: the number does not fit into 64 bits; name a "
                "floating dtype");
    return static_cast<T>(value);
  }
}

/// Writes the elements at `out`. Reading one from a device lets other threads run, so each is kept
/// meanwhile, and a list that they change is an error.
template <class T>
void fill(PyObject* data, T*& out, T* end) {
  const bool list = PyList_Check(data);
  if (list || PyTuple_Check(data)) {
    for (Py_ssize_t i = 0; i < (list ? PyList_Size(data) : PyTuple_Size(data)); ++i) {
      const Object item =
          Object::borrow(checked(list ? PyList_GetItem(data, i) : PyTuple_GetItem(data, i)));
      fill(item.get(), out, end);
    }
    return;
  }
  check(out < end, "the data changed while it was read");
  if (PyFloat_Check(data)) {
    const double value = PyFloat_AsDouble(data);
    if constexpr (std::is_same_v<T, bool>)
      *out++ = value != 0;
    else
      *out++ = static_cast<T>(value);
  } else if (PyLong_CheckExact(data)) {
    *out++ = from_int<T>(data);
  } else {
    const T value = scalar_arg(data).template to<T>();
    *out++ = value;
  }
}

template <class T>
void fill(PyObject* data, const Tensor& target) {
  if (target.numel() == 0) return;
  T* out = target.data_as<T>();
  T* const end = out + target.numel();
  fill(data, out, end);
  check(out == end, "the data changed while it was read");
}

/// The first element that is not itself a list or tuple (borrowed); a list where they nest deeper
/// than tensors have dimensions, or for ever.
PyObject* first_leaf(PyObject* data) {
  for (int64_t depth = 0;; ++depth) {
    const bool list = PyList_Check(data);
    if (depth > kMaxDims) return data;
    if (!list && !PyTuple_Check(data)) return data;
    if ((list ? PyList_Size(data) : PyTuple_Size(data)) == 0) return data;
    data = list ? PyList_GetItem(data, 0) : PyTuple_GetItem(data, 0);
  }
}

/// `data` with every sequence in it as a list.
Object as_lists(PyObject* data, int64_t depth) {
  if (!is_sequence(data) && !is_other_sequence(data)) return Object::borrow(data);
  check_value(depth < kMaxDims, "too many dimensions: a tensor has at most ", kMaxDims);
  Object list = own(PySequence_List(data));
  for (Py_ssize_t i = 0; i < PyList_Size(list.get()); ++i)
    PyList_SetItem(list.get(), i, as_lists(PyList_GetItem(list.get(), i), depth + 1).release());
  return list;
}

/// Arrays in a list: NumPy stacks them.
Tensor from_arrays(PyObject* data) {
  const Object numpy = own(PyImport_ImportModule("numpy"));
  const Object array = own(PyObject_CallMethod(numpy.get(), "asarray", "(O)", data));
  return copy_of(from_array_interface(array.get()));
}

Tensor from_data(PyObject* data, std::optional<DType> dtype) {
  Shape shape;
  // The first pass follows the first element of each level to learn the depth.
  scan(data, shape, 0);
  if (shape.other_sequences) {
    const Object lists = as_lists(data, 0);
    return is_ndarray(first_leaf(lists.get())) ? from_arrays(lists.get())
                                               : from_data(lists.get(), dtype);
  }
  if (!shape.any) shape.dtype = default_dtype();
  const DType target = dtype.value_or(shape.dtype);
  // Build in a type that holds every value exactly, then convert once.
  if (is_floating(target)) {
    Tensor out = empty(shape.sizes, target == DType::Float32 ? DType::Float32 : DType::Float64);
    if (out.dtype() == DType::Float32)
      fill<float>(data, out);
    else
      fill<double>(data, out);
    note_host_written(*out.storage());
    return out.dtype() == target ? out : ops::_to_dtype(out, target);
  }
  if (target == DType::Bool) {
    Tensor out = empty(shape.sizes, DType::Bool);
    fill<bool>(data, out);
    note_host_written(*out.storage());
    return out;
  }
  // Elements that the dtype does not hold are an error, not another number.
  const auto check_elements = [target]<class T>(const Tensor& exact, T) {
    const T* values = exact.data_as<T>();
    for (int64_t i = 0; i < exact.numel(); ++i) check_fits(Scalar(values[i]), target);
  };
  if (is_floating(shape.dtype)) {
    const Tensor exact = from_data(data, DType::Float64);
    check_elements(exact, double{});
    return ops::_to_dtype(exact, target);
  }
  Tensor out = empty(shape.sizes, DType::Int64);
  fill<int64_t>(data, out);
  note_host_written(*out.storage());
  if (target == DType::Int64) return out;
  check_elements(out, int64_t{});
  return ops::_to_dtype(out, target);
}

// --- NumPy and buffers

struct DataOptions {
  std::optional<DType> dtype;
  std::optional<Device> device;
  bool requires_grad = false;
};

/// `copy`: torch.tensor always copies, as_tensor shares where it can.
Tensor make_tensor(PyObject* data, const DataOptions& options, bool copy) {
  Tensor out;
  if (!copy && is_tensor(data)) {  // as_tensor keeps the history
    out = tensor_of(data);
    if (options.dtype && out.dtype() != *options.dtype) out = ops::_to_dtype(out, *options.dtype);
    if (options.device && !(out.device() == *options.device))
      out = ops::copy_(empty(out.sizes(), out.dtype(), *options.device), out, false);
    return out;
  }
  {
    const NoGrad no_grad;
    if (is_tensor(data)) {
      out = copy_of(ops::detach(tensor_of(data)));
    } else if (!is_sequence(data) && !PyLong_Check(data) && !PyFloat_Check(data) &&
               has_array_interface(data)) {
      out = from_array_interface(data);
      if (copy) out = copy_of(out);
    } else if (!is_sequence(data) && has_cuda_array_interface(data)) {
      out = from_cuda_array_interface(data);
      if (copy) out = copy_of(out);
    } else if (is_sequence(data) && is_ndarray(first_leaf(data))) {
      out = from_arrays(data);
    } else {
      out = from_data(data, options.dtype);
    }
    if (options.dtype && out.dtype() != *options.dtype) out = ops::_to_dtype(out, *options.dtype);
    if (options.device && !(out.device() == *options.device)) {
      Tensor moved = empty(out.sizes(), out.dtype(), *options.device);
      ops::copy_(moved, out, false);
      out = moved;
    }
  }
  autograd::mark_inference(out);
  if (options.requires_grad) {
    check(is_floating(out.dtype()),
          "Only Tensors of floating point and complex dtype can require gradients");
    out.impl()->requires_grad = true;
  }
  return out;
}

PyObject* parse_and_make(PyObject* args, PyObject* kwargs, bool copy) {
  return guarded([&]() -> PyObject* {
    static const char* names[] = {"data",       "dtype", "device", "requires_grad",
                                  "pin_memory", "copy",  nullptr};
    PyObject *data = nullptr, *dtype = nullptr, *device = nullptr;
    int requires_grad = 0, pin = 0, ignored = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOppp", const_cast<char**>(names), &data,
                                     &dtype, &device, &requires_grad, &pin, &ignored)) {
      return nullptr;
    }
    DataOptions options;
    if (dtype && dtype != Py_None) options.dtype = dtype_arg(dtype);
    if (device && device != Py_None)
      options.device = device_arg(device);
    else if (default_device_choice.chosen)
      options.device = resolve_device(default_device());
    options.requires_grad = requires_grad != 0;
    return wrap(make_tensor(data, options, copy));
  });
}
PyObject* tensor_function(PyObject*, PyObject* args, PyObject* kwargs) {
  return parse_and_make(args, kwargs, true);
}
PyObject* as_tensor_function(PyObject*, PyObject* args, PyObject* kwargs) {
  return parse_and_make(args, kwargs, false);
}

PyObject* from_numpy_function(PyObject*, PyObject* array) {
  return guarded([&]() -> PyObject* {
    check_type(!is_tensor(array) && !is_sequence(array) && has_array_interface(array),
               "expected np.ndarray (got ", type_name(array), ")");
    return wrap(from_array_interface(array));
  });
}

/// _from_buffer(buffer, dtype, shape, offset_bytes=0): a tensor over any Python buffer, kept alive.
PyObject* from_buffer_function(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *buffer = nullptr, *dtype = nullptr, *shape = nullptr;
    Py_ssize_t offset = 0;
    if (!PyArg_ParseTuple(args, "OOO|n", &buffer, &dtype, &shape, &offset)) return nullptr;
    const DType type = dtype_arg(dtype);
    const IntListHolder sizes = int_list_arg(shape, 0);
    const int64_t numel = checked_numel(sizes);
    int64_t nbytes = 0;
    check_value(!__builtin_mul_overflow(numel, item_size(type), &nbytes),
                "buffer too small for shape ", IntSpan(sizes));
    // The limited API of 3.10 has no Py_buffer: read address, size and writability through
    // memoryview and ctypes.
    const Object view = own(PyMemoryView_FromObject(buffer));
    const Object size = own(PyObject_GetAttrString(view.get(), "nbytes"));
    const Object readonly = own(PyObject_GetAttrString(view.get(), "readonly"));
    const int64_t total = int_arg(size.get());
    check_value(offset >= 0 && offset <= total && nbytes <= total - offset, "buffer of ", total,
                " bytes is too small for shape ", IntSpan(sizes), " of ", type, " at offset ",
                int64_t{offset});
    const bool writable = PyObject_IsTrue(readonly.get()) == 0;
    if (nbytes == 0) return wrap(empty(sizes, type));
    const Object module = own(PyImport_ImportModule("vibetensor._buffers"));
    const Object address = own(PyObject_CallMethod(module.get(), "address", "O", view.get()));
    auto* data = static_cast<char*>(PyLong_AsVoidPtr(address.get())) + offset;
    if (PyErr_Occurred()) return nullptr;
    return wrap(borrow(data, static_cast<size_t>(nbytes), view.get(), writable, sizes,
                       contiguous_strides(sizes), type));
  });
}

/// _as_buffer(tensor): the bytes of a contiguous CPU tensor as a memoryview that keeps it alive.
PyObject* as_buffer_function(PyObject*, PyObject* object) {
  return guarded([&]() -> PyObject* {
    check_type(is_tensor(object), "_as_buffer expects a Tensor");
    host_read(tensor_of(object), "reading the bytes (pickling, saving)");
    const Tensor& t = tensor_of(object);
    check(t.device().is_cpu() && t.is_contiguous(),
          "_as_buffer needs a contiguous CPU tensor, got ", t, " on ", t.device());
    const Object module = own(PyImport_ImportModule("vibetensor._buffers"));
    return PyObject_CallMethod(
        module.get(), "view", "OKn", object,
        static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(t.data())),
        static_cast<Py_ssize_t>(t.numel() * t.itemsize()));
  });
}

// --- tensor methods

PyObject* method_item(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    check(t.numel() == 1, "a Tensor with ", t.numel(), " elements cannot be converted to Scalar");
    return wrap(t.item());
  });
}

PyObject* to_list(const char* data, DType dtype, IntSpan sizes, IntSpan strides) {
  if (sizes.empty()) return wrap(load_scalar(data, dtype));
  Object list = own(PyList_New(static_cast<Py_ssize_t>(sizes[0])));
  for (int64_t i = 0; i < sizes[0]; ++i) {
    PyObject* item = to_list(data + i * strides[0] * item_size(dtype), dtype, sizes.subspan(1),
                             strides.subspan(1));
    PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), checked(item));
  }
  return list.release();
}
PyObject* method_tolist(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    Tensor t = tensor_of(self);
    host_read(t, "tolist()");
    if (!t.device().is_cpu()) {
      const NoGrad no_grad;
      Tensor host = empty(t.sizes(), t.dtype());
      ops::copy_(host, t, false);
      t = host;
    }
    return to_list(static_cast<const char*>(t.data()), t.dtype(), t.sizes(), t.strides());
  });
}

/// The consumer's stream as the array API writes it for CUDA: None and 1 mean the default stream, 2
/// the per-thread one, -1 that no ordering is wanted; anything else is a driver handle.
void order_consumer(const Tensor& t, PyObject* stream) {
  if (t.device().is_cpu()) {
    check_value(!stream || stream == Py_None, "__dlpack__: stream must be None for a CPU tensor");
    return;
  }
  const int64_t number = !stream || stream == Py_None ? 1 : int_arg(stream);
  if (number == -1) return;
  check_value(number != 0, "__dlpack__: stream 0 is ambiguous; pass 1 for the default stream");
  check_value(number > 0, "__dlpack__: invalid stream ", number);
  const auto handle = number == 1 ? uintptr_t{0} : static_cast<uintptr_t>(number);
  backend_for(t.device().type)->order_streams(t.device().index, handle, false);
}

PyObject* method_dlpack(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    static const char* names[] = {"stream", "max_version", "dl_device", "copy", nullptr};
    PyObject *stream = nullptr, *max_version = nullptr, *device = nullptr, *copy = nullptr;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO", const_cast<char**>(names), &stream,
                                     &max_version, &device, &copy)) {
      return nullptr;
    }
    Tensor t = tensor_of(self);
    if (autograd::requires_grad(t)) {
      PyErr_SetString(PyExc_BufferError,
                      "Can't export tensors that require gradient, use tensor.detach()");
      return nullptr;
    }
    if (device && device != Py_None) {
      const IntListHolder wanted = int_list_arg(device, 0);
      const bool cpu = t.device().is_cpu();
      if (wanted.size() != 2 || wanted[0] != (cpu ? 1 : 2) ||
          wanted[1] != (cpu ? 0 : t.device().index)) {
        PyErr_SetString(PyExc_BufferError,
                        "__dlpack__: only the tensor's own device can be exported to");
        return nullptr;
      }
    }
    const bool versioned =
        max_version && max_version != Py_None && int_list_arg(max_version, 0)[0] >= 1;
    if (copy == Py_True) t = copy_of(t);
    order_consumer(t, stream);
    if (!versioned && !t.storage()->writable()) {
      PyErr_SetString(
          PyExc_BufferError,
          "read-only memory can only be exported to consumers that pass max_version >= (1, 0)");
      return nullptr;
    }
    host_read(t, "__dlpack__()");
    return io::to_dlpack_capsule(t, versioned, copy == Py_True);
  });
}
PyObject* method_dlpack_device(PyObject* self, PyObject*) {
  const Device d = tensor_of(self).device();
  return Py_BuildValue("(ii)", d.is_cpu() ? 1 : 2, d.is_cpu() ? 0 : int{d.index});
}

/// What a producer's __dlpack__ is to be told of our stream; null for memory of the host.
Object consumer_stream(PyObject* source) {
  if (!PyObject_HasAttrString(source, "__dlpack_device__")) return {};
  const Object place = own(PyObject_CallMethod(source, "__dlpack_device__", nullptr));
  long kind = 0, index = 0;
  if (!PyArg_ParseTuple(place.get(), "ll", &kind, &index)) throw PythonError();
  if (kind != 2 && kind != 13) return {};
  const Device device = resolve_device({DeviceType::CUDA, static_cast<int8_t>(index)});
  const uintptr_t handle = backend_for(device.type)->current_stream(device.index);
  return own(PyLong_FromUnsignedLongLong(handle ? handle : 1));
}

PyObject* from_dlpack_function(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    static const char* names[] = {"ext_tensor", "device", "copy", nullptr};
    PyObject *source = nullptr, *device = nullptr, *copy = nullptr;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OO", const_cast<char**>(names), &source,
                                     &device, &copy))
      return nullptr;
    Object capsule;
    if (PyCapsule_CheckExact(source)) {
      capsule = Object::borrow(source);
    } else {
      const Object method = own(PyObject_GetAttrString(source, "__dlpack__"));
      const Object empty_args = own(PyTuple_New(0));
      const Object options = own(Py_BuildValue("{s:(ii)}", "max_version", 1, 0));
      const Object stream = consumer_stream(source);
      if (stream && PyDict_SetItemString(options.get(), "stream", stream.get()) < 0) return nullptr;
      if (copy && copy != Py_None && PyDict_SetItemString(options.get(), "copy", copy) < 0)
        return nullptr;
      capsule = Object(PyObject_Call(method.get(), empty_args.get(), options.get()));
      if (!capsule) {
        // Producers older than DLPack 1.0 take no max_version.
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return nullptr;
        PyErr_Clear();
        if (PyDict_DelItemString(options.get(), "max_version") < 0) return nullptr;
        capsule = own(PyObject_Call(method.get(), empty_args.get(), options.get()));
      }
    }
    Tensor out = io::from_dlpack_capsule(capsule.get());
    if (copy == Py_True) out = copy_of(out);
    return wrap(out);
  });
}

PyMethodDef functions[] = {
    {"tensor", as_cfunction(tensor_function), METH_VARARGS | METH_KEYWORDS,
     "tensor(data, *, dtype=None, device=None, requires_grad=False): a new tensor with a copy of "
     "`data` (numbers, nested "
     "sequences, arrays, tensors)."},
    {"as_tensor", as_cfunction(as_tensor_function), METH_VARARGS | METH_KEYWORDS,
     "as_tensor(data, dtype=None, device=None): like tensor(), sharing memory with arrays and "
     "tensors where it can."},
    {"from_numpy", from_numpy_function, METH_O, "A tensor that shares a NumPy array's memory."},
    {"_from_buffer", from_buffer_function, METH_VARARGS, "A tensor over a Python buffer."},
    {"_as_buffer", as_buffer_function, METH_O, "A contiguous CPU tensor's bytes as a memoryview."},
    {"from_dlpack", as_cfunction(from_dlpack_function), METH_VARARGS | METH_KEYWORDS,
     "from_dlpack(ext_tensor, *, device=None, copy=None): a tensor over another library's memory."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyObject* array_interface(PyObject* self, void*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    if (!t.device().is_cpu() || t.dtype() == DType::BFloat16 || is_float8(t.dtype())) {
      fail(ErrorKind::Attribute, "__array_interface__: no NumPy form for a ", t.dtype(),
           " tensor on ", t.device());
    }
    check(!autograd::should_record(t),
          "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.");
    host_read(t, "numpy()");
    constexpr const char* types[kNumDTypes] = {"|b1", "|u1", "|i1", "<i2", "<i4", "<i8",
                                               "<f2", "",    "<f4", "<f8", "",    ""};
    Dims bytes;
    for (const int64_t s : t.strides()) bytes.push_back(s * t.itemsize());
    const Object shape = own(wrap_ints(t.sizes()));
    const Object strides = own(wrap_ints(bytes));
    return Py_BuildValue(
        "{s:i,s:O,s:s,s:(KO),s:O}", "version", 3, "shape", shape.get(), "typestr",
        types[static_cast<int>(t.dtype())], "data",
        static_cast<unsigned long long>(t.numel() ? reinterpret_cast<uintptr_t>(t.data()) : 0),
        t.storage()->writable() ? Py_False : Py_True, "strides", strides.get());
  });
}

PyMethodDef conversion_methods[] = {
    {"item", method_item, METH_NOARGS, "The only element as a Python number."},
    {"tolist", method_tolist, METH_NOARGS,
     "Nested lists of Python numbers (a number for a 0-d tensor)."},
    {"__dlpack__", as_cfunction(method_dlpack), METH_VARARGS | METH_KEYWORDS,
     "__dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None)"},
    {"__dlpack_device__", method_dlpack_device, METH_NOARGS, "(device type, device id) of DLPack."},
    {nullptr, nullptr, 0, nullptr}};
PyMethodDef* conversion_functions = functions;

}  // namespace vt::python
