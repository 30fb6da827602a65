#include "python/array_interface.h"

#include <charconv>
#include <optional>

#include "core/device_backend.h"
#include "core/storage_observer.h"
#include "python/arguments.h"
#include "python/tensor_type.h"

namespace vt::python {
namespace {

void release_object(void* context, void*, size_t) noexcept {
  if (Py_IsInitialized()) release_anywhere(static_cast<PyObject*>(context));
}

/// What both interfaces say of an array.
struct Interface {
  Object info;  // the dictionary
  IntListHolder sizes;
  Dims strides;  // in elements
  DType dtype;
  void* data;
  bool read_only;

  size_t nbytes() const {
    return static_cast<size_t>(span_elements(sizes, strides) * item_size(dtype));
  }
};

PyObject* item(const Object& info, const char* key) {
  return PyDict_GetItemString(info.get(), key);
}

std::optional<DType> dtype_of_typestr(char kind, int width) {
  switch (kind) {
    case 'b':
      if (width == 1) return DType::Bool;
      break;
    case 'u':
      if (width == 1) return DType::UInt8;
      break;
    case 'i':
      if (width == 1) return DType::Int8;
      if (width == 2) return DType::Int16;
      if (width == 4) return DType::Int32;
      if (width == 8) return DType::Int64;
      break;
    case 'f':
      if (width == 2) return DType::Float16;
      if (width == 4) return DType::Float32;
      if (width == 8) return DType::Float64;
      break;
    default:
      break;
  }
  return std::nullopt;
}

/// `array`: what errors call the object ("np.ndarray").
Interface parse(Object info, const char* array, const char* interface) {
  check_type(PyDict_Check(info.get()), interface, " must be a dict");
  PyObject* shape = item(info, "shape");
  PyObject* typestr = item(info, "typestr");
  PyObject* data = item(info, "data");
  PyObject* strides_object = item(info, "strides");
  check_type(shape && typestr && data && PyTuple_Check(data) && PyTuple_Size(data) == 2, interface,
             " is incomplete: it needs shape, typestr and data, a pair");
  const std::string_view kind = str_arg(typestr);
  check_type(kind.size() >= 3 && kind[0] != '>', "given ", array,
             " has byte order different from the native byte order. "
             "Conversion between byte orders is currently not supported.");
  int width = 0;
  std::from_chars(kind.data() + 2, kind.data() + kind.size(), width);
  const std::optional<DType> dtype = dtype_of_typestr(kind[1], width);
  check_type(dtype.has_value(), "can't convert ", array, " of type ", kind,
             ". The only supported types are: float64, float32, "
             "float16, int64, int32, int16, int8, uint8, and bool.");
  IntListHolder sizes = int_list_arg(shape, 0);
  checked_numel(sizes);
  Dims strides = contiguous_strides(sizes);
  if (strides_object && strides_object != Py_None) {
    const IntListHolder bytes = int_list_arg(strides_object, 0);
    check_value(bytes.size() == sizes.size(), interface, " has ", bytes.size(), " strides for ",
                sizes.size(), " dimensions");
    for (size_t i = 0; i < sizes.size(); ++i) {
      check_value(bytes[i] >= 0, "At least one stride in the given ", array,
                  " is negative, and tensors with negative strides are not currently supported. "
                  "(You can probably work around this by making a copy of your array with "
                  "array.copy().)");
      check_value(bytes[i] % width == 0, "given ", array,
                  " strides not a multiple of the element byte size. Copy the array to reallocate "
                  "the memory.");
      strides[i] = bytes[i] / width;
    }
  }
  PyObject* pointer = PyTuple_GetItem(data, 0);
  void* address = pointer == Py_None ? nullptr : PyLong_AsVoidPtr(pointer);
  if (PyErr_Occurred()) throw PythonError();
  const bool read_only = PyObject_IsTrue(PyTuple_GetItem(data, 1)) == 1;
  const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  check_value(address || empty, interface, ": data is a null pointer, and the shape ",
              IntSpan(sizes), " has elements");
  return {std::move(info), std::move(sizes), std::move(strides), *dtype, address, read_only};
}

/// The producer's stream as a driver handle; none where it asks for no ordering.
std::optional<uintptr_t> stream_of(const Object& info) {
  PyObject* stream = item(info, "stream");
  if (!stream || stream == Py_None) return std::nullopt;
  const int64_t number = int_arg(stream);
  check_value(number != 0,
              "__cuda_array_interface__: stream 0 is ambiguous; use 1 (the legacy default stream) "
              "or 2 (the per-thread default stream)");
  check_value(number > 0, "__cuda_array_interface__: ", number, " is not a stream");
  return number == 1 ? 0 : static_cast<uintptr_t>(number);
}

}  // namespace

Tensor borrow(void* data, size_t nbytes, PyObject* keeper, bool writable, IntSpan sizes,
              IntSpan strides, DType dtype, Device device) {
  Py_INCREF(keeper);
  auto storage = make_ref<Storage>(Allocation{data, nbytes, keeper, release_object}, device);
  note_host_written(*storage, true);
  storage->set_writable(writable);
  auto impl = make_ref<TensorImpl>(std::move(storage), dtype, device);
  impl->set_geometry(sizes, strides, 0);
  return Tensor(std::move(impl));
}

bool has_array_interface(PyObject* object) {
  return PyObject_HasAttrString(object, "__array_interface__") == 1;
}

Tensor from_array_interface(PyObject* given) {
  // A NumPy scalar's interface points into a temporary; its __array__ is an array that lasts (for
  // an array, itself).
  const Object kept = PyObject_HasAttrString(given, "__array__")
                          ? own(PyObject_CallMethod(given, "__array__", nullptr))
                          : Object::borrow(given);
  const Interface of = parse(own(PyObject_GetAttrString(kept.get(), "__array_interface__")),
                             "np.ndarray", "__array_interface__");
  return borrow(of.data, of.nbytes(), kept.get(), !of.read_only, of.sizes, of.strides, of.dtype);
}

bool is_ndarray(PyObject* object) {
  if (PyFloat_Check(object) || PyLong_Check(object)) return false;
  static PyTypeObject* type = nullptr;  // kept for the life of the process, as NumPy is
  if (!type) {
    const Object name = own(PyUnicode_FromString("numpy"));
    const Object numpy(PyImport_GetModule(name.get()));
    if (!numpy) return PyErr_Clear(), false;
    // A NumPy that is being imported has no ndarray yet.
    const Object found(PyObject_GetAttrString(numpy.get(), "ndarray"));
    if (!found || !PyType_Check(found.get())) return PyErr_Clear(), false;
    type = reinterpret_cast<PyTypeObject*>(new_reference(found.get()));
  }
  return PyType_IsSubtype(Py_TYPE(object), type) != 0;
}

Tensor copy_of_ndarray(PyObject* array) {
  const Object dtype = own(PyObject_GetAttrString(array, "dtype"));
  const Object kind = own(PyObject_GetAttrString(dtype.get(), "kind"));
  const Object size = own(PyObject_GetAttrString(dtype.get(), "itemsize"));
  const bool widen = str_arg(kind.get()) == "u" && int_arg(size.get()) > 1;
  const Object numpy = own(PyImport_ImportModule("numpy"));
  const Object function = own(PyObject_GetAttrString(numpy.get(), "array"));
  const Object args = own(PyTuple_Pack(1, array));
  const Object options = own(widen ? Py_BuildValue("{s:s,s:s}", "order", "C", "dtype", "int64")
                                   : Py_BuildValue("{s:s}", "order", "C"));
  const Object copy = own(PyObject_Call(function.get(), args.get(), options.get()));
  const Object module = own(PyImport_ImportModule("vibetensor._C"));
  const Object made = own(PyObject_CallMethod(module.get(), "as_tensor", "(O)", copy.get()));
  return tensor_of(made.get());
}

Tensor new_tensor(PyObject* data) {
  const Object module = own(PyImport_ImportModule("vibetensor._C"));
  const Object made = own(PyObject_CallMethod(module.get(), "tensor", "(O)", data));
  return tensor_of(made.get());
}

bool has_cuda_array_interface(PyObject* object) {
  return PyObject_HasAttrString(object, "__cuda_array_interface__") == 1;
}

Tensor from_cuda_array_interface(PyObject* object) {
  const Interface of = parse(own(PyObject_GetAttrString(object, "__cuda_array_interface__")),
                             "array", "__cuda_array_interface__");
  PyObject* mask = item(of.info, "mask");
  check_type(!mask || mask == Py_None, "__cuda_array_interface__: masked arrays are not supported");
  Device device = resolve_device({DeviceType::CUDA, -1});
  DeviceBackend& backend = *backend_for(DeviceType::CUDA);
  if (of.data) {
    const int index = backend.device_of(of.data);
    check_value(index >= 0, "__cuda_array_interface__: the data pointer is not device memory");
    device.index = static_cast<int8_t>(index);
  } else {
    check_value(of.nbytes() == 0, "__cuda_array_interface__: the data pointer is null");
  }
  if (const auto stream = stream_of(of.info)) backend.order_streams(device.index, *stream, true);
  return borrow(of.data, of.nbytes(), object, !of.read_only, of.sizes, of.strides, of.dtype,
                device);
}

}  // namespace vt::python
