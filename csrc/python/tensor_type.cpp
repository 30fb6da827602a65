// The Tensor type: life cycle, properties and operators.
#include "python/tensor_type.h"

#include <cstddef>
#include <cstring>

#include "autograd/front.h"
#include "core/storage_observer.h"
#include "dispatch/default_device.h"
#include "dispatch/thread_state.h"
#include "python/arguments.h"
#include "python/array_interface.h"
#include "python/autograd.h"
#include "structmember.h"
#include "vt/ops.h"

namespace vt::python {

PyTypeObject* tensor_type = nullptr;

namespace {

PyTensor* as_py(PyObject* object) { return reinterpret_cast<PyTensor*>(object); }

// --- life cycle

void tensor_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  PyTensor* py = as_py(self);
  if (py->weak_references) PyObject_ClearWeakRefs(self);
  if (TensorImpl* impl = py->tensor.impl(); impl && impl->python_object == self)
    impl->python_object = nullptr;
  Py_CLEAR(py->dict);
  py->tensor.~Tensor();
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}
int tensor_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(as_py(self)->dict);
  return visit_hooks(as_py(self)->tensor, visit, arg);
}
int tensor_clear(PyObject* self) {
  Py_CLEAR(as_py(self)->dict);
  clear_hooks(as_py(self)->tensor);
  return 0;
}

PyObject* tensor_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    // torch.Tensor(2, 3), torch.Tensor([..]), torch.Tensor(other): float32, kept for old code.
    const Py_ssize_t n = PyTuple_Size(args);
    if (n == 1) {
      PyObject* data = PyTuple_GetItem(args, 0);
      if (is_tensor(data)) return wrap_as(type, alias(tensor_of(data)));
      if (PyType_IsSubtype(Py_TYPE(data), size_type))
        return wrap_as(type, empty(int_list_arg(data, 0), default_dtype()));
      check_type(!PyFloat_Check(data) && !PyBool_Check(data) && data != Py_None,
                 "Tensor(): expected a sequence, a tensor or sizes, got ", type_name(data));
      if (!PyLong_Check(data)) {
        // As in torch, the default device is not for this form.
        const Scoped<DefaultDevice> cpu(default_device_choice, DefaultDevice{Device{}, true});
        const Object module = own(PyImport_ImportModule("vibetensor.torch"));
        const Object made = own(PyObject_CallMethod(module.get(), "tensor", "(O)", data));
        return wrap_as(type, ops::_to_dtype(tensor_of(made.get()), default_dtype()));
      }
    }
    return wrap_as(
        type, empty(n == 0 ? IntSpan(Dims{0}) : IntSpan(int_list_arg(args, 0)), default_dtype()));
  });
}

// --- properties

template <class F>
PyObject* get(PyObject* self, F&& f) {
  return guarded([&]() -> PyObject* { return f(tensor_of(self)); });
}
PyObject* get_shape(PyObject* self, void*) {
  return get(self, [](const Tensor& t) { return wrap_size(t.sizes()); });
}
PyObject* get_dtype(PyObject* self, void*) { return wrap_dtype(tensor_of(self).dtype()); }
PyObject* get_device(PyObject* self, void*) {
  return get(self, [](const Tensor& t) { return wrap_device(t.device()); });
}
PyObject* get_ndim(PyObject* self, void*) { return PyLong_FromLongLong(tensor_of(self).dim()); }
PyObject* get_itemsize(PyObject* self, void*) {
  return PyLong_FromLongLong(tensor_of(self).itemsize());
}
PyObject* get_nbytes(PyObject* self, void*) {
  return PyLong_FromLongLong(tensor_of(self).numel() * tensor_of(self).itemsize());
}
PyObject* get_layout(PyObject*, void*) {
  return guarded([&]() -> PyObject* {
    const Object module = own(PyImport_ImportModule("vibetensor._C"));
    return PyObject_GetAttrString(module.get(), "strided");
  });
}
PyObject* get_is_cpu(PyObject* self, void*) {
  return PyBool_FromLong(tensor_of(self).device().is_cpu());
}
PyObject* get_is_cuda(PyObject* self, void*) {
  return PyBool_FromLong(tensor_of(self).device().is_cuda());
}
PyObject* get_false(PyObject*, void*) { return PyBool_FromLong(0); }
PyObject* get_T(PyObject* self, void*) {
  return get(self, [](const Tensor& t) {
    Dims order;
    for (int64_t d = t.dim() - 1; d >= 0; --d) order.push_back(d);
    return wrap(ops::permute(t, order));
  });
}
PyObject* get_mT(PyObject* self, void*) {
  return get(self, [](const Tensor& t) {
    check(t.dim() >= 2, "tensor.mT is only supported on matrices or batches of matrices. Got ",
          t.dim(), "-D tensor.");
    return wrap(ops::transpose(t, -2, -1));
  });
}

PyObject* method_dim(PyObject* self, PyObject*) {
  return PyLong_FromLongLong(tensor_of(self).dim());
}
PyObject* method_numel(PyObject* self, PyObject*) {
  return PyLong_FromLongLong(tensor_of(self).numel());
}
PyObject* method_size(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    if (nargs == 0 && !kwnames) return wrap_size(t.sizes());
    return PyLong_FromLongLong(t.size(int_arg(args[0])));
  });
}
PyObject* method_stride(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    if (nargs == 0) return wrap_ints(t.strides());
    return PyLong_FromLongLong(t.stride(int_arg(args[0])));
  });
}
PyObject* method_element_size(PyObject* self, PyObject*) { return get_itemsize(self, nullptr); }
PyObject* method_storage_offset(PyObject* self, PyObject*) {
  return PyLong_FromLongLong(tensor_of(self).storage_offset());
}
PyObject* method_data_ptr(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    note_bytes_wanted(*t.storage());
    return PyLong_FromUnsignedLongLong(t.numel() == 0 ? 0 : reinterpret_cast<uintptr_t>(t.data()));
  });
}
PyObject* method_storage_key(PyObject* self, PyObject*) {
  return PyLong_FromUnsignedLongLong(reinterpret_cast<uintptr_t>(tensor_of(self).storage().get()));
}
PyObject* method_storage_nbytes(PyObject* self, PyObject*) {
  return PyLong_FromSize_t(tensor_of(self).storage()->nbytes());
}
PyObject* method_is_contiguous(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                               PyObject* kwnames) {
  return guarded([&]() -> PyObject* {
    const Py_ssize_t total = nargs + (kwnames ? PyTuple_Size(kwnames) : 0);
    const MemoryFormat format = total > 0 ? memory_format_arg(args[0]) : MemoryFormat::Contiguous;
    return PyBool_FromLong(tensor_of(self).is_contiguous(format));
  });
}
PyObject* method_is_floating_point(PyObject* self, PyObject*) {
  return PyBool_FromLong(is_floating(tensor_of(self).dtype()));
}
PyObject* method_is_signed(PyObject* self, PyObject*) {
  return PyBool_FromLong(is_signed(tensor_of(self).dtype()));
}
PyObject* method_false(PyObject*, PyObject*) { return PyBool_FromLong(0); }

PyMethodDef basic_methods[] = {
    {"dim", method_dim, METH_NOARGS, "The number of dimensions."},
    {"ndimension", method_dim, METH_NOARGS, "The number of dimensions."},
    {"numel", method_numel, METH_NOARGS, "The number of elements."},
    {"nelement", method_numel, METH_NOARGS, "The number of elements."},
    {"size", as_cfunction(method_size), METH_FASTCALL | METH_KEYWORDS,
     "size(dim=None): the shape, or one extent."},
    {"stride", as_cfunction(method_stride), METH_FASTCALL | METH_KEYWORDS,
     "stride(dim=None): strides in elements."},
    {"element_size", method_element_size, METH_NOARGS, "Bytes per element."},
    {"storage_offset", method_storage_offset, METH_NOARGS,
     "Elements from the start of the storage."},
    {"data_ptr", method_data_ptr, METH_NOARGS, "The address of the first element."},
    {"_storage_key", method_storage_key, METH_NOARGS,
     "An integer that two tensors share if they share a storage."},
    {"_storage_nbytes", method_storage_nbytes, METH_NOARGS, "Bytes of the whole storage."},
    {"is_contiguous", as_cfunction(method_is_contiguous), METH_FASTCALL | METH_KEYWORDS,
     "is_contiguous(memory_format=torch.contiguous_format): whether the elements lie in order "
     "without gaps."},
    {"is_floating_point", method_is_floating_point, METH_NOARGS, "True for floating dtypes."},
    {"is_signed", method_is_signed, METH_NOARGS, "True if negative values can be represented."},
    {"is_complex", method_false, METH_NOARGS, "Always False."},
    {"is_conj", method_false, METH_NOARGS, "Always False."},
    {"is_neg", method_false, METH_NOARGS, "Always False."},
    {"is_pinned", method_false, METH_NOARGS,
     "Whether the memory is page-locked; never on a CPU build."},
};

PyGetSetDef basic_properties[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, "What was set by name.",
     nullptr},
    {"shape", get_shape, nullptr, "The extents, as torch.Size.", nullptr},
    {"dtype", get_dtype, nullptr, "The element type.", nullptr},
    {"device", get_device, nullptr, "Where the elements live.", nullptr},
    {"ndim", get_ndim, nullptr, "The number of dimensions.", nullptr},
    {"itemsize", get_itemsize, nullptr, "Bytes per element.", nullptr},
    {"nbytes", get_nbytes, nullptr, "Bytes of all elements.", nullptr},
    {"layout", get_layout, nullptr, "Always torch.strided.", nullptr},
    {"is_cpu", get_is_cpu, nullptr, nullptr, nullptr},
    {"is_cuda", get_is_cuda, nullptr, nullptr, nullptr},
    {"is_sparse", get_false, nullptr, nullptr, nullptr},
    {"is_quantized", get_false, nullptr, nullptr, nullptr},
    {"is_nested", get_false, nullptr, nullptr, nullptr},
    {"is_meta", get_false, nullptr, nullptr, nullptr},
    {"T", get_T, nullptr, "All dimensions reversed.", nullptr},
    {"mT", get_mT, nullptr, "The last two dimensions swapped.", nullptr},
    {"H", get_mT, nullptr, "The last two dimensions swapped.", nullptr},
};

// --- operators

bool operand(PyObject* object) {
  return is_tensor(object) || is_number(object) || is_ndarray(object);
}

/// Reads an operand. An array of NumPy's becomes a tensor, so that what comes out is one, on either
/// side of the operator and with its gradient; one of no dimensions counts as a number.
TensorArg operand_arg(PyObject* object) {
  if (is_tensor(object) || is_number(object)) return tensor_or_scalar_arg(object);
  return TensorArg(copy_of_ndarray(object));
}

template <class F>
PyObject* binary(PyObject* a, PyObject* b, F&& f) {
  if (!operand(a) || !operand(b)) {
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
  }
  return guarded([&]() -> PyObject* {
    const TensorArg x = operand_arg(a), y = operand_arg(b);
    ReleaseGil gil(work_size(x, y));
    const Tensor result = f(x.get(), y.get());
    gil.reacquire();
    return wrap(result);
  });
}
template <class F>
PyObject* in_place(PyObject* a, PyObject* b, F&& f) {
  if (!operand(b)) {
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
  }
  return guarded([&]() -> PyObject* {
    const TensorArg x = tensor_arg(a), y = operand_arg(b);
    ReleaseGil gil(work_size(x, y));
    f(x.get(), y.get());
    gil.reacquire();
    return new_reference(a);
  });
}
template <class F>
PyObject* unary(PyObject* a, F&& f) {
  return guarded([&]() -> PyObject* {
    const Tensor& x = tensor_of(a);
    ReleaseGil gil(host_work(x));
    const Tensor result = f(x);
    gil.reacquire();
    return wrap(result);
  });
}

#define VT_BINARY_SLOT(name, expression)                                              \
  PyObject* slot_##name(PyObject* a, PyObject* b) {                                   \
    return binary(a, b, [](const Tensor& x, const Tensor& y) { return expression; }); \
  }                                                                                   \
  static_assert(true)
#define VT_INPLACE_SLOT(name, expression)                                        \
  PyObject* slot_inplace_##name(PyObject* a, PyObject* b) {                      \
    return in_place(a, b, [](const Tensor& x, const Tensor& y) { expression; }); \
  }                                                                              \
  static_assert(true)

VT_BINARY_SLOT(add, ops::add(x, y, Scalar(1)));
VT_BINARY_SLOT(sub, ops::sub(x, y, Scalar(1)));
VT_BINARY_SLOT(mul, ops::mul(x, y));
VT_BINARY_SLOT(div, ops::div(x, y));
VT_BINARY_SLOT(floor_divide, ops::floor_divide(x, y));
VT_BINARY_SLOT(remainder, ops::remainder(x, y));
VT_BINARY_SLOT(matmul, ops::matmul(x, y));
VT_BINARY_SLOT(and, ops::bitwise_and(x, y));
VT_BINARY_SLOT(or, ops::bitwise_or(x, y));
VT_BINARY_SLOT(xor, ops::bitwise_xor(x, y));
VT_BINARY_SLOT(lshift, ops::bitwise_left_shift(x, y));
VT_BINARY_SLOT(rshift, ops::bitwise_right_shift(x, y));
VT_INPLACE_SLOT(add, ops::add_(x, y, Scalar(1)));
VT_INPLACE_SLOT(sub, ops::sub_(x, y, Scalar(1)));
VT_INPLACE_SLOT(mul, ops::mul_(x, y));
VT_INPLACE_SLOT(div, ops::div_(x, y));
VT_INPLACE_SLOT(floor_divide, ops::floor_divide_(x, y));
VT_INPLACE_SLOT(remainder, ops::remainder_(x, y));
VT_INPLACE_SLOT(and, ops::bitwise_and_(x, y));
VT_INPLACE_SLOT(or, ops::bitwise_or_(x, y));
VT_INPLACE_SLOT(xor, ops::bitwise_xor_(x, y));
VT_INPLACE_SLOT(lshift, ops::bitwise_left_shift_(x, y));
VT_INPLACE_SLOT(rshift, ops::bitwise_right_shift_(x, y));
#undef VT_BINARY_SLOT
#undef VT_INPLACE_SLOT

PyObject* slot_pow(PyObject* a, PyObject* b, PyObject*) {
  return binary(a, b, [](const Tensor& x, const Tensor& y) { return ops::pow(x, y); });
}
PyObject* slot_inplace_pow(PyObject* a, PyObject* b, PyObject*) {
  return in_place(a, b, [](const Tensor& x, const Tensor& y) { ops::pow_(x, y); });
}
PyObject* slot_neg(PyObject* a) {
  return unary(a, [](const Tensor& x) { return ops::neg(x); });
}
PyObject* slot_pos(PyObject* a) {
  return unary(a, [](const Tensor& x) { return ops::positive(x); });
}
PyObject* slot_abs(PyObject* a) {
  return unary(a, [](const Tensor& x) { return ops::abs(x); });
}
PyObject* slot_invert(PyObject* a) {
  return unary(a, [](const Tensor& x) { return ops::bitwise_not(x); });
}

PyObject* slot_compare(PyObject* a, PyObject* b, int op) {
  return binary(a, b, [op](const Tensor& x, const Tensor& y) {
    switch (op) {
      case Py_EQ:
        return ops::eq(x, y);
      case Py_NE:
        return ops::ne(x, y);
      case Py_LT:
        return ops::lt(x, y);
      case Py_LE:
        return ops::le(x, y);
      case Py_GT:
        return ops::gt(x, y);
      default:
        return ops::ge(x, y);
    }
  });
}

Scalar one_element(PyObject* self, const char* what) {
  const Tensor& t = tensor_of(self);
  check(t.numel() != 0 || std::strcmp(what, "bool") != 0,
        "Boolean value of Tensor with no values is ambiguous");
  check(t.numel() == 1 || std::strcmp(what, "bool") != 0,
        "Boolean value of Tensor with more than one value is ambiguous");
  check_value(t.numel() == 1, "only one element tensors can be converted to Python scalars (shape ",
              t.sizes(), ")");
  return t.item();
}
int slot_bool(PyObject* self) {
  try {
    return one_element(self, "bool").to_bool();
  } catch (...) {
    raise_current();
    return -1;
  }
}
PyObject* slot_int(PyObject* self) {
  return guarded([&]() -> PyObject* {
    const Scalar value = one_element(self, "int");
    return value.is_float() ? PyLong_FromDouble(value.to_double()) : wrap(value.to_int());
  });
}
PyObject* slot_float(PyObject* self) {
  return guarded([&]() -> PyObject* { return wrap(one_element(self, "float").to_double()); });
}
PyObject* slot_index(PyObject* self) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    check_type(is_integral(t.dtype(), true) && t.numel() == 1,
               "only integer tensors of a single element can be converted to an index");
    return wrap(t.item().to_int());
  });
}
Py_ssize_t slot_length(PyObject* self) {
  const Tensor& t = tensor_of(self);
  if (t.dim() == 0) {
    PyErr_SetString(PyExc_TypeError, "len() of a 0-d tensor");
    return -1;
  }
  return static_cast<Py_ssize_t>(t.sizes()[0]);
}
Py_hash_t slot_hash(PyObject* self) {
  return static_cast<Py_hash_t>(reinterpret_cast<uintptr_t>(self) >> 4);
}

PyMemberDef members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(PyTensor, dict), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(PyTensor, weak_references), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

std::vector<PyMethodDef>& all_methods() {
  static auto* methods = new std::vector<PyMethodDef>;
  return *methods;
}
std::vector<PyGetSetDef>& all_properties() {
  static auto* properties = new std::vector<PyGetSetDef>;
  return *properties;
}

void append_methods(PyMethodDef* table) {
  for (; table->ml_name; ++table) all_methods().push_back(*table);
}

}  // namespace

PyObject* wrap_as(PyTypeObject* type, const Tensor& tensor) {
  PyObject* object = checked(PyType_GenericAlloc(type, 0));
  new (&as_py(object)->tensor) Tensor(tensor);
  tensor.impl()->python_object = object;
  return object;
}

PyObject* wrap(const Tensor& tensor) {
  TensorImpl* impl = tensor.impl();
  if (!impl) return none();
  if (impl->python_object) return new_reference(static_cast<PyObject*>(impl->python_object));
  return wrap_as(tensor_type, tensor);
}

void add_tensor_type(PyObject* module, std::vector<PyMethodDef>& op_methods) {
  auto& methods = all_methods();
  methods.insert(methods.end(), std::begin(basic_methods), std::end(basic_methods));
  append_methods(indexing_methods);
  append_methods(conversion_methods);
  append_methods(tensor_autograd_methods);
  methods.insert(methods.end(), op_methods.begin(), op_methods.end());
  methods.push_back({nullptr, nullptr, 0, nullptr});
  auto& properties = all_properties();
  properties.insert(properties.end(), std::begin(basic_properties), std::end(basic_properties));
  for (PyGetSetDef* p = tensor_properties; p->name; ++p) properties.push_back(*p);
  properties.push_back({nullptr, nullptr, nullptr, nullptr, nullptr});

  auto slot = [](auto* f) { return reinterpret_cast<void*>(f); };
  static PyType_Slot slots[] = {
      {Py_tp_new, slot(tensor_new)},
      {Py_tp_dealloc, slot(tensor_dealloc)},
      {Py_tp_traverse, slot(tensor_traverse)},
      {Py_tp_clear, slot(tensor_clear)},
      {Py_tp_members, members},
      {Py_tp_methods, methods.data()},
      {Py_tp_getset, properties.data()},
      {Py_tp_hash, slot(slot_hash)},
      {Py_tp_richcompare, slot(slot_compare)},
      {Py_tp_doc, const_cast<char*>("A multi-dimensional array with autograd.")},
      {Py_mp_length, slot(slot_length)},
      {Py_mp_subscript, slot(tensor_get_item)},
      {Py_mp_ass_subscript, slot(tensor_set_item)},
      {Py_nb_add, slot(slot_add)},
      {Py_nb_subtract, slot(slot_sub)},
      {Py_nb_multiply, slot(slot_mul)},
      {Py_nb_true_divide, slot(slot_div)},
      {Py_nb_floor_divide, slot(slot_floor_divide)},
      {Py_nb_remainder, slot(slot_remainder)},
      {Py_nb_power, slot(slot_pow)},
      {Py_nb_matrix_multiply, slot(slot_matmul)},
      {Py_nb_and, slot(slot_and)},
      {Py_nb_or, slot(slot_or)},
      {Py_nb_xor, slot(slot_xor)},
      {Py_nb_lshift, slot(slot_lshift)},
      {Py_nb_rshift, slot(slot_rshift)},
      {Py_nb_inplace_add, slot(slot_inplace_add)},
      {Py_nb_inplace_subtract, slot(slot_inplace_sub)},
      {Py_nb_inplace_multiply, slot(slot_inplace_mul)},
      {Py_nb_inplace_true_divide, slot(slot_inplace_div)},
      {Py_nb_inplace_floor_divide, slot(slot_inplace_floor_divide)},
      {Py_nb_inplace_remainder, slot(slot_inplace_remainder)},
      {Py_nb_inplace_power, slot(slot_inplace_pow)},
      {Py_nb_inplace_and, slot(slot_inplace_and)},
      {Py_nb_inplace_or, slot(slot_inplace_or)},
      {Py_nb_inplace_xor, slot(slot_inplace_xor)},
      {Py_nb_inplace_lshift, slot(slot_inplace_lshift)},
      {Py_nb_inplace_rshift, slot(slot_inplace_rshift)},
      {Py_nb_negative, slot(slot_neg)},
      {Py_nb_positive, slot(slot_pos)},
      {Py_nb_absolute, slot(slot_abs)},
      {Py_nb_invert, slot(slot_invert)},
      {Py_nb_bool, slot(slot_bool)},
      {Py_nb_int, slot(slot_int)},
      {Py_nb_float, slot(slot_float)},
      {Py_nb_index, slot(slot_index)},
      {0, nullptr}};
  static PyType_Spec spec = {"vibetensor.Tensor", sizeof(PyTensor), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  tensor_type = reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&spec)));
  Py_INCREF(reinterpret_cast<PyObject*>(tensor_type));
  if (PyModule_AddObject(module, "Tensor", reinterpret_cast<PyObject*>(tensor_type)) < 0)
    throw PythonError();
}

}  // namespace vt::python
