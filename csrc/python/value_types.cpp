// torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, torch.Size.
#include <cstring>
#include <string>
#include <vector>

#include "core/device_backend.h"
#include "dispatch/default_device.h"
#include "python/arguments.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace vt::python {

PyTypeObject* dtype_type = nullptr;
PyTypeObject* device_type = nullptr;
PyTypeObject* memory_format_type = nullptr;
PyTypeObject* layout_type = nullptr;
PyTypeObject* generator_type = nullptr;
PyTypeObject* size_type = nullptr;

namespace {

struct PyDType {
  PyObject_HEAD DType value;
};
struct PyDevice {
  PyObject_HEAD Device value;
};
struct PyMemoryFormat {
  PyObject_HEAD MemoryFormat value;
};
struct PyGenerator {
  PyObject_HEAD Generator value;
};

PyObject* dtypes[kNumDTypes];
PyObject* formats[3];
PyObject* strided = nullptr;

DType dtype_value(PyObject* self) { return reinterpret_cast<PyDType*>(self)->value; }
Device device_value(PyObject* self) { return reinterpret_cast<PyDevice*>(self)->value; }
Generator& generator_value(PyObject* self) { return reinterpret_cast<PyGenerator*>(self)->value; }

PyObject* text(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

void free_plain(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// --- dtype

PyObject* dtype_repr(PyObject* self) { return text(str("torch.", dtype_value(self))); }
PyObject* dtype_reduce(PyObject* self, PyObject*) {
  return text(std::string(dtype_name(dtype_value(self))));
}
PyObject* dtype_itemsize(PyObject* self, void*) {
  return PyLong_FromLongLong(item_size(dtype_value(self)));
}
PyObject* dtype_is_float(PyObject* self, void*) {
  return PyBool_FromLong(is_floating(dtype_value(self)));
}
PyObject* dtype_is_signed(PyObject* self, void*) {
  return PyBool_FromLong(is_signed(dtype_value(self)));
}
PyObject* dtype_is_complex(PyObject*, void*) { return PyBool_FromLong(0); }
PyObject* dtype_same(PyObject* self, PyObject*) { return new_reference(self); }

PyGetSetDef dtype_properties[] = {
    {"itemsize", dtype_itemsize, nullptr, "Bytes per element.", nullptr},
    {"is_floating_point", dtype_is_float, nullptr,
     "True for float16, bfloat16, float32, float64, float8_e4m3fn and float8_e5m2.", nullptr},
    {"is_signed", dtype_is_signed, nullptr, "True if negative values can be represented.", nullptr},
    {"is_complex", dtype_is_complex, nullptr, "Always False: there are no complex dtypes.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef dtype_methods[] = {{"__reduce__", dtype_reduce, METH_NOARGS, nullptr},
                               {"__copy__", dtype_same, METH_NOARGS, nullptr},
                               {"__deepcopy__", dtype_same, METH_O, nullptr},
                               {nullptr, nullptr, 0, nullptr}};
PyType_Slot dtype_slots[] = {{Py_tp_repr, reinterpret_cast<void*>(dtype_repr)},
                             {Py_tp_getset, dtype_properties},
                             {Py_tp_methods, dtype_methods},
                             {Py_tp_dealloc, reinterpret_cast<void*>(free_plain)},
                             {Py_tp_doc, const_cast<char*>("An element type.")},
                             {0, nullptr}};
PyType_Spec dtype_spec = {"vibetensor._C.dtype", sizeof(PyDType), 0, Py_TPFLAGS_DEFAULT,
                          dtype_slots};

// --- device

PyObject* device_repr(PyObject* self) {
  const Device d = device_value(self);
  if (d.is_cpu() || d.index < 0)
    return text(str("device(type='", d.is_cpu() ? "cpu" : "cuda", "')"));
  return text(str("device(type='cuda', index=", int{d.index}, ")"));
}
PyObject* device_str(PyObject* self) { return text(device_name(device_value(self))); }
PyObject* device_kind(PyObject* self, void*) {
  return text(device_value(self).is_cpu() ? "cpu" : "cuda");
}
PyObject* device_index(PyObject* self, void*) {
  const Device d = device_value(self);
  return d.is_cpu() || d.index < 0 ? none() : PyLong_FromLong(d.index);
}
Py_hash_t device_hash(PyObject* self) {
  const Device d = device_value(self);
  return static_cast<Py_hash_t>(static_cast<int>(d.type) * 131 + d.index + 2);
}
PyObject* device_compare(PyObject* a, PyObject* b, int op) {
  if ((op != Py_EQ && op != Py_NE) || !is_device(b)) {
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
  }
  return PyBool_FromLong((device_value(a) == device_value(b)) == (op == Py_EQ));
}
PyObject* device_new(PyTypeObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    static const char* names[] = {"type", "index", nullptr};
    PyObject* kind = nullptr;
    PyObject* index = nullptr;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:device", const_cast<char**>(names), &kind,
                                     &index))
      return nullptr;
    Device device = unresolved_device_arg(kind);
    if (index && index != Py_None) {
      check(PyUnicode_Check(kind) && device.index <= 0 &&
                str_arg(kind).find(':') == std::string_view::npos,
            "type (string) must not include an index because index was passed explicitly");
      const int64_t i = int_arg(index);
      check(i >= 0 && i < 128 && (device.is_cuda() || i == 0), "Device index ", i,
            " is not valid for ", device);
      device.index = static_cast<int8_t>(i);
    }
    if (device.index < 0) {  // the current one; without hardware the first
      const DeviceBackend* backend = backend_for(device.type);
      device.index = static_cast<int8_t>(backend && backend->count() > 0 ? backend->current() : 0);
    }
    return wrap_device(device);
  });
}
PyObject* device_reduce(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    return Py_BuildValue("(O(s))", reinterpret_cast<PyObject*>(device_type),
                         device_name(device_value(self)).c_str());
  });
}
/// What the `with torch.device(...)` blocks that this thread is in go back to, outermost first.
std::vector<DefaultDevice>& outer_devices() {
  thread_local std::vector<DefaultDevice> devices;
  return devices;
}
PyObject* device_enter(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const DefaultDevice outer = default_device_choice;
    set_default_device(device_value(self));
    outer_devices().push_back(outer);
    return new_reference(self);
  });
}
PyObject* device_exit(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    std::vector<DefaultDevice>& outer = outer_devices();
    check(!outer.empty(), "torch.device.__exit__ without __enter__ on this thread");
    default_device_choice = outer.back();
    outer.pop_back();
    return none();
  });
}
/// `@torch.device("cuda")`: the function runs with this default device.
PyObject* device_call(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    PyObject* function = nullptr;
    static const char* names[] = {"func", nullptr};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:device", const_cast<char**>(names),
                                     &function))
      return nullptr;
    const Object module = own(PyImport_ImportModule("vibetensor.torch.session"));
    return PyObject_CallMethod(module.get(), "_with_default_device", "OO", self, function);
  });
}
PyGetSetDef device_properties[] = {
    {"type", device_kind, nullptr, "'cpu' or 'cuda'.", nullptr},
    {"index", device_index, nullptr, "The index, or None for the current device.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef device_methods[] = {
    {"__reduce__", device_reduce, METH_NOARGS, nullptr},
    {"__enter__", device_enter, METH_NOARGS, "New tensors that name no device live here."},
    {"__exit__", device_exit, METH_VARARGS, "Restores the default device."},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot device_slots[] = {
    {Py_tp_repr, reinterpret_cast<void*>(device_repr)},
    {Py_tp_str, reinterpret_cast<void*>(device_str)},
    {Py_tp_hash, reinterpret_cast<void*>(device_hash)},
    {Py_tp_richcompare, reinterpret_cast<void*>(device_compare)},
    {Py_tp_new, reinterpret_cast<void*>(device_new)},
    {Py_tp_call, reinterpret_cast<void*>(device_call)},
    {Py_tp_getset, device_properties},
    {Py_tp_methods, device_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_plain)},
    {Py_tp_doc, const_cast<char*>(
                    "device(type, index=None): where a tensor lives. As a context manager, it is "
                    "where new tensors that name no device go.")},
    {0, nullptr}};
PyType_Spec device_spec = {"vibetensor._C.device", sizeof(PyDevice), 0, Py_TPFLAGS_DEFAULT,
                           device_slots};

// --- memory_format and layout

PyObject* format_repr(PyObject* self) {
  constexpr const char* names[] = {"torch.contiguous_format", "torch.channels_last",
                                   "torch.preserve_format"};
  return text(names[static_cast<int>(memory_format_of(self))]);
}
/// The name that it has in the module: there is one of each.
PyObject* format_reduce(PyObject* self, PyObject*) {
  const Object name = own(format_repr(self));
  return text(std::string(str_arg(name.get()).substr(6)));
}
PyMethodDef format_methods[] = {{"__reduce__", format_reduce, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
PyType_Slot format_slots[] = {{Py_tp_repr, reinterpret_cast<void*>(format_repr)},
                              {Py_tp_methods, format_methods},
                              {Py_tp_dealloc, reinterpret_cast<void*>(free_plain)},
                              {0, nullptr}};
PyType_Spec format_spec = {"vibetensor._C.memory_format", sizeof(PyMemoryFormat), 0,
                           Py_TPFLAGS_DEFAULT, format_slots};

PyObject* layout_repr(PyObject*) { return text("torch.strided"); }
PyType_Slot layout_slots[] = {{Py_tp_repr, reinterpret_cast<void*>(layout_repr)},
                              {Py_tp_dealloc, reinterpret_cast<void*>(free_plain)},
                              {0, nullptr}};
PyType_Spec layout_spec = {"vibetensor._C.layout", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT,
                           layout_slots};

// --- Generator

PyObject* generator_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    static const char* names[] = {"device", nullptr};
    PyObject* device = nullptr;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:Generator", const_cast<char**>(names),
                                     &device))
      return nullptr;
    Object self = own(PyType_GenericAlloc(type, 0));
    new (&generator_value(self.get()))
        Generator(make_ref<GeneratorImpl>(device ? device_arg(device) : Device{}));
    return self.release();
  });
}
void generator_dealloc(PyObject* self) {
  generator_value(self).~Generator();
  free_plain(self);
}
PyObject* generator_manual_seed(PyObject* self, PyObject* seed) {
  return guarded([&]() -> PyObject* {
    const Object index = own(PyNumber_Index(seed));
    int sign = 0;  // of a number beyond 64 bits
    int64_t value = PyLong_AsLongLongAndOverflow(index.get(), &sign);
    if (sign > 0) {
      value = static_cast<int64_t>(PyLong_AsUnsignedLongLong(index.get()));
      if (PyErr_Occurred()) sign = 2;
    }
    if (sign < 0 || sign > 1) {
      PyErr_Clear();
      const Object shown = own(PyObject_Str(index.get()));
      fail(ErrorKind::Value, "manual_seed expects a seed in [-2**63, 2**64 - 1], got ",
           str_arg(shown.get()));
    }
    generator_value(self)->set_seed(static_cast<uint64_t>(value));
    return new_reference(self);
  });
}
PyObject* generator_initial_seed(PyObject* self, PyObject*) {
  return PyLong_FromUnsignedLongLong(generator_value(self)->seed());
}
PyObject* generator_seed(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Object os = own(PyImport_ImportModule("os"));
    const Object bytes = own(PyObject_CallMethod(os.get(), "urandom", "i", 8));
    uint64_t value = 0;
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.get(), &data, &size) < 0) return nullptr;
    std::memcpy(&value, data, sizeof value);
    value &= (uint64_t{1} << 63) - 1;
    generator_value(self)->set_seed(value);
    return PyLong_FromUnsignedLongLong(value);
  });
}
/// State: seed and offset as 16 little-endian bytes in a uint8 tensor.
PyObject* generator_get_state(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const uint64_t state[2] = {generator_value(self)->seed(), generator_value(self)->offset()};
    const Tensor out = empty(Dims{16}, DType::UInt8);
    std::memcpy(out.data(), state, sizeof state);
    return wrap(out);
  });
}
PyObject* generator_set_state(PyObject* self, PyObject* state) {
  return guarded([&]() -> PyObject* {
    check_type(is_tensor(state), "RNG state must be a torch.ByteTensor");
    const Tensor& t = tensor_of(state);
    check(t.dtype() == DType::UInt8 && t.numel() == 16 && t.is_contiguous() && t.device().is_cpu(),
          "RNG state must be a contiguous uint8 CPU tensor of 16 bytes, got ", t);
    uint64_t values[2];
    std::memcpy(values, t.data(), sizeof values);
    generator_value(self)->set_state(values[0], values[1]);
    return new_reference(self);
  });
}
PyObject* generator_device(PyObject* self, void*) {
  return wrap_device(generator_value(self)->device());
}

/// Pickles and copies are another generator with the same state.
PyObject* generator_reduce(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const GeneratorImpl& g = *generator_value(self);
    const Object device = own(wrap_device(g.device()));
    return Py_BuildValue("(O(O)(KK))", reinterpret_cast<PyObject*>(Py_TYPE(self)), device.get(),
                         static_cast<unsigned long long>(g.seed()),
                         static_cast<unsigned long long>(g.offset()));
  });
}
PyObject* generator_setstate(PyObject* self, PyObject* state) {
  return guarded([&]() -> PyObject* {
    unsigned long long seed = 0, offset = 0;
    if (!PyArg_ParseTuple(state, "KK:__setstate__", &seed, &offset)) return nullptr;
    generator_value(self)->set_state(seed, offset);
    Py_RETURN_NONE;
  });
}

PyMethodDef generator_methods[] = {
    {"__reduce__", generator_reduce, METH_NOARGS, nullptr},
    {"__setstate__", generator_setstate, METH_O, nullptr},
    {"manual_seed", generator_manual_seed, METH_O, "Seeds the generator; returns it."},
    {"initial_seed", generator_initial_seed, METH_NOARGS, "The seed last set."},
    {"seed", generator_seed, METH_NOARGS, "Seeds from the operating system; returns the seed."},
    {"get_state", generator_get_state, METH_NOARGS, "The state as a uint8 tensor (seed, offset)."},
    {"set_state", generator_set_state, METH_O, "Restores a state from get_state."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef generator_properties[] = {
    {"device", generator_device, nullptr, "The device it draws for.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot generator_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(generator_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(generator_dealloc)},
    {Py_tp_methods, generator_methods},
    {Py_tp_getset, generator_properties},
    {Py_tp_doc, const_cast<char*>("Generator(device='cpu'): a Philox random number generator.")},
    {0, nullptr}};
PyType_Spec generator_spec = {"vibetensor._C.Generator", sizeof(PyGenerator), 0,
                              Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, generator_slots};

// --- Size

/// Size(iterable) of ints and of what counts as one, which becomes an int.
PyObject* size_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  return guarded([&]() -> PyObject* {
    static const auto tuple_new =
        reinterpret_cast<newfunc>(PyType_GetSlot(&PyTuple_Type, Py_tp_new));
    Object made = own(tuple_new(type, args, kwargs));
    for (Py_ssize_t i = 0; i < PyTuple_Size(made.get()); ++i) {
      PyObject* item = PyTuple_GetItem(made.get(), i);
      if (PyLong_CheckExact(item)) continue;
      const bool whole = is_tensor(item) ? is_integral(tensor_of(item).dtype(), true) &&
                                               tensor_of(item).numel() == 1
                                         : PyIndex_Check(item) != 0;
      check_type(whole, "torch.Size() takes an iterable of ints, item ", int64_t{i}, " is ",
                 type_name(item));
      // Of a bool too: PyNumber_Index would give it back.
      const Object number = own(PyNumber_Index(item));
      PyTuple_SetItem(made.get(), i, checked(PyLong_FromLongLong(int_arg(number.get()))));
    }
    return made.release();
  });
}
PyObject* size_repr(PyObject* self) {
  return guarded([&]() -> PyObject* {
    std::string out = "torch.Size([";
    for (Py_ssize_t i = 0; i < PyTuple_Size(self); ++i) {
      if (i) out += ", ";
      const Object item = own(PyObject_Repr(PyTuple_GetItem(self, i)));
      out += str_arg(item.get());
    }
    return text(out + "])");
  });
}
PyObject* size_numel(PyObject* self, PyObject*) {
  long long total = 1;
  for (Py_ssize_t i = 0; i < PyTuple_Size(self); ++i)
    total *= PyLong_AsLongLong(PyTuple_GetItem(self, i));
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(total);
}
/// What a tuple's own slot gives, as a Size where it is a tuple.
PyObject* as_size(PyObject* result) {
  if (!result || !PyTuple_Check(result)) return result;
  const Object items(result);
  return PyObject_CallFunctionObjArgs(reinterpret_cast<PyObject*>(size_type), items.get(), nullptr);
}
/// Size + tuple and tuple + Size.
PyObject* size_add(PyObject* a, PyObject* b) {
  static const auto concat =
      reinterpret_cast<binaryfunc>(PyType_GetSlot(&PyTuple_Type, Py_sq_concat));
  if (!PyTuple_Check(a) || !PyTuple_Check(b)) {
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
  }
  return as_size(concat(a, b));
}
PyObject* size_repeat(PyObject* self, Py_ssize_t count) {
  static const auto repeat =
      reinterpret_cast<ssizeargfunc>(PyType_GetSlot(&PyTuple_Type, Py_sq_repeat));
  return as_size(repeat(self, count));
}
PyObject* size_subscript(PyObject* self, PyObject* index) {
  static const auto subscript =
      reinterpret_cast<binaryfunc>(PyType_GetSlot(&PyTuple_Type, Py_mp_subscript));
  PyObject* result = subscript(self, index);
  return PySlice_Check(index) ? as_size(result) : result;
}
PyMethodDef size_methods[] = {{"numel", size_numel, METH_NOARGS, "The number of elements."},
                              {nullptr, nullptr, 0, nullptr}};
PyType_Slot size_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(size_new)},
    {Py_tp_repr, reinterpret_cast<void*>(size_repr)},
    {Py_nb_add, reinterpret_cast<void*>(size_add)},
    {Py_sq_repeat, reinterpret_cast<void*>(size_repeat)},
    {Py_mp_subscript, reinterpret_cast<void*>(size_subscript)},
    {Py_tp_methods, size_methods},
    {Py_tp_doc, const_cast<char*>("The shape of a tensor: a tuple of ints.")},
    {0, nullptr}};
PyType_Spec size_spec = {"vibetensor._C.Size", 0, 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                         size_slots};

PyTypeObject* make_type(PyType_Spec& spec) {
  return reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&spec)));
}

void add(PyObject* module, const char* name, PyObject* object) {
  Py_INCREF(object);
  if (PyModule_AddObject(module, name, object) < 0) throw PythonError();
}

}  // namespace

bool is_dtype(PyObject* object) { return Py_TYPE(object) == dtype_type; }
bool is_device(PyObject* object) { return Py_TYPE(object) == device_type; }
DType dtype_of(PyObject* object) { return dtype_value(object); }
Device device_of(PyObject* object) { return device_value(object); }
MemoryFormat memory_format_of(PyObject* object) {
  return reinterpret_cast<PyMemoryFormat*>(object)->value;
}
Generator generator_of(PyObject* object) { return generator_value(object); }

PyObject* wrap_dtype(DType dtype) { return new_reference(dtypes[static_cast<int>(dtype)]); }
PyObject* wrap_device(Device device) {
  PyObject* object = checked(PyType_GenericAlloc(device_type, 0));
  reinterpret_cast<PyDevice*>(object)->value = device;
  return object;
}
PyObject* wrap_memory_format(MemoryFormat format) {
  return new_reference(formats[static_cast<int>(format)]);
}
PyObject* wrap_generator(const Generator& generator) {
  PyObject* object = checked(PyType_GenericAlloc(generator_type, 0));
  new (&generator_value(object)) Generator(generator);
  return object;
}
PyObject* wrap_ints(IntSpan values) {
  Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i),
                    checked(PyLong_FromLongLong(values[i])));
  }
  return tuple.release();
}
PyObject* wrap_size(IntSpan sizes) {
  // A tuple subclass has no stable-ABI constructor that fills in place: go through the type.
  const Object items = own(wrap_ints(sizes));
  return checked(
      PyObject_CallFunctionObjArgs(reinterpret_cast<PyObject*>(size_type), items.get(), nullptr));
}

void add_value_types(PyObject* module) {
  dtype_type = make_type(dtype_spec);
  device_type = make_type(device_spec);
  memory_format_type = make_type(format_spec);
  layout_type = make_type(layout_spec);
  generator_type = make_type(generator_spec);
  const Object bases = own(PyTuple_Pack(1, reinterpret_cast<PyObject*>(&PyTuple_Type)));
  size_type =
      reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpecWithBases(&size_spec, bases.get())));
  add(module, "dtype", reinterpret_cast<PyObject*>(dtype_type));
  add(module, "device", reinterpret_cast<PyObject*>(device_type));
  add(module, "memory_format", reinterpret_cast<PyObject*>(memory_format_type));
  add(module, "layout", reinterpret_cast<PyObject*>(layout_type));
  add(module, "Generator", reinterpret_cast<PyObject*>(generator_type));
  add(module, "Size", reinterpret_cast<PyObject*>(size_type));
  for (int i = 0; i < kNumDTypes; ++i) {
    dtypes[i] = checked(PyType_GenericAlloc(dtype_type, 0));
    reinterpret_cast<PyDType*>(dtypes[i])->value = static_cast<DType>(i);
    add(module, std::string(dtype_name(static_cast<DType>(i))).c_str(), dtypes[i]);
  }
  constexpr std::pair<const char*, DType> names[] = {
      {"half", DType::Float16}, {"float", DType::Float32}, {"double", DType::Float64},
      {"short", DType::Int16},  {"int", DType::Int32},     {"long", DType::Int64}};
  for (const auto& [name, dtype] : names) add(module, name, dtypes[static_cast<int>(dtype)]);
  constexpr const char* format_names[] = {"contiguous_format", "channels_last", "preserve_format"};
  for (int i = 0; i < 3; ++i) {
    formats[i] = checked(PyType_GenericAlloc(memory_format_type, 0));
    reinterpret_cast<PyMemoryFormat*>(formats[i])->value = static_cast<MemoryFormat>(i);
    add(module, format_names[i], formats[i]);
  }
  strided = checked(PyType_GenericAlloc(layout_type, 0));
  add(module, "strided", strided);
}

}  // namespace vt::python
