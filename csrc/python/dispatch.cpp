// Overrides of ops, modes that see every op, the recorder, and autocast state.
#include <string>

#include "dispatch/autocast.h"
#include "dispatch/layers.h"
#include "dispatch/recorder.h"
#include "python/arguments.h"
#include "python/autograd.h"
#include "python/tensor_type.h"

namespace vt::python {
namespace {

Object args_tuple(std::span<const Value> args) {
  Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(args.size())));
  for (size_t i = 0; i < args.size(); ++i) {
    PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), checked(value_to_python(args[i])));
  }
  return tuple;
}

Value result_value(PyObject* object) {
  if (object == Py_None) return Value();
  if (is_tensor(object)) return tensor_of(object);
  if (PyBool_Check(object)) return object == Py_True;
  if (PyLong_Check(object)) return int_arg(object);
  if (PyFloat_Check(object)) return float_arg(object);
  if (PyTuple_Check(object) || PyList_Check(object)) return optional_tensor_list_arg(object).items;
  fail(ErrorKind::Type, "an override must return a Tensor, a sequence of Tensors or a number");
}

/// What a Python override or mode calls to run the original op with the arguments it was given.
struct PyOriginal {
  PyObject_HEAD OpId id;
  std::span<const Value> args;
  bool alive;
};
PyTypeObject* original_type = nullptr;

PyObject* original_call(PyObject* self, PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    const auto* original = reinterpret_cast<PyOriginal*>(self);
    check(original->alive, "the original of an op can only be called while its override runs");
    return value_to_python(call_op(original->id, original->args));
  });
}
void original_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}
PyType_Slot original_slots[] = {
    {Py_tp_call, reinterpret_cast<void*>(original_call)},
    {Py_tp_dealloc, reinterpret_cast<void*>(original_dealloc)},
    {Py_tp_doc, const_cast<char*>("The op an override replaces; call it to run the original.")},
    {0, nullptr}};
PyType_Spec original_spec = {"vibetensor._C.Original", sizeof(PyOriginal), 0, Py_TPFLAGS_DEFAULT,
                             original_slots};

/// function(original, name, args) -> result
class PyLayer final : public Layer {
 public:
  explicit PyLayer(PyObject* function) : function_(function) { Py_INCREF(function_); }
  ~PyLayer() override {
    if (Py_IsInitialized()) release_anywhere(function_);
  }
  Value call(OpId id, std::span<const Value> args) override {
    const AcquireGil gil;
    const Object original = own(PyType_GenericAlloc(original_type, 0));
    auto* raw = reinterpret_cast<PyOriginal*>(original.get());
    raw->id = id;
    raw->args = args;
    raw->alive = true;
    const Object name = own(PyUnicode_FromStringAndSize(
        op_name(id).data(), static_cast<Py_ssize_t>(op_name(id).size())));
    const Object boxed = args_tuple(args);
    const Object result(
        PyObject_CallFunctionObjArgs(function_, original.get(), name.get(), boxed.get(), nullptr));
    raw->alive = false;
    if (!result) throw_python_error();
    return result_value(result.get());
  }

 private:
  PyObject* function_;
};

OpId op_arg(PyObject* name) {
  const int id = find_op(str_arg(name));
  check_value(id >= 0, "no op is named '", str_arg(name), "'; docs/ops.md lists them");
  return static_cast<OpId>(id);
}

PyObject* set_override_function(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *name = nullptr, *function = nullptr;
    if (!PyArg_ParseTuple(args, "OO", &name, &function)) return nullptr;
    set_override(op_arg(name),
                 function == Py_None ? Ref<Layer>() : Ref<Layer>(new PyLayer(function)));
    return none();
  });
}
PyObject* push_mode_function(PyObject*, PyObject* function) {
  return guarded([&]() -> PyObject* {
    push_mode(Ref<Layer>(new PyLayer(function)));
    return none();
  });
}
PyObject* pop_mode_function(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    pop_mode();
    return none();
  });
}
PyObject* op_names(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    Object list = own(PyList_New(0));
    for (int i = 0; i < kNumOps; ++i) {
      const auto id = static_cast<OpId>(i);
      const Object pair = own(Py_BuildValue(
          "(s#s#)", op_name(id).data(), static_cast<Py_ssize_t>(op_name(id).size()),
          op_capture_class(id).data(), static_cast<Py_ssize_t>(op_capture_class(id).size())));
      if (PyList_Append(list.get(), pair.get()) < 0) return nullptr;
    }
    return list.release();
  });
}

// --- recorder

struct PyRecorder {
  PyObject_HEAD Ref<Recorder> recorder;
};
Ref<Recorder>& recorder_of(PyObject* self) { return reinterpret_cast<PyRecorder*>(self)->recorder; }

PyObject* recorder_new(PyTypeObject* type, PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* self = checked(PyType_GenericAlloc(type, 0));
    new (&recorder_of(self)) Ref<Recorder>(new Recorder);
    return self;
  });
}
void recorder_dealloc(PyObject* self) {
  recorder_of(self).~Ref();
  original_dealloc(self);
}
PyObject* recorder_start(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    recorder_of(self)->start();
    return new_reference(self);
  });
}
PyObject* recorder_stop(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    recorder_of(self)->stop();
    return none();
  });
}
PyObject* recorder_exit(PyObject* self, PyObject*) { return recorder_stop(self, nullptr); }
PyObject* recorder_replay(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    ReleaseGil gil(ReleaseGil::kWorthwhile);
    recorder_of(self)->replay();
    gil.reacquire();
    return none();
  });
}
PyObject* recorder_clear(PyObject* self, PyObject*) {
  recorder_of(self)->clear();
  return none();
}
Py_ssize_t recorder_length(PyObject* self) {
  return static_cast<Py_ssize_t>(recorder_of(self)->calls().size());
}
PyObject* recorder_calls(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    Object list = own(PyList_New(0));
    for (const Recorder::Call& call : recorder_of(self)->calls()) {
      const Object args = args_tuple(call.args);
      const Object outputs = own(wrap(call.outputs));
      const Object entry = own(Py_BuildValue("(s#OO)", op_name(call.id).data(),
                                             static_cast<Py_ssize_t>(op_name(call.id).size()),
                                             args.get(), outputs.get()));
      if (PyList_Append(list.get(), entry.get()) < 0) return nullptr;
    }
    return list.release();
  });
}
PyMethodDef recorder_methods[] = {
    {"__enter__", recorder_start, METH_NOARGS, "Starts recording on this thread."},
    {"__exit__", recorder_exit, METH_VARARGS, "Stops recording."},
    {"replay", recorder_replay, METH_NOARGS,
     "Runs every recorded kernel again on the same storages."},
    {"calls", recorder_calls, METH_NOARGS, "The record: (op name, arguments, outputs) in order."},
    {"clear", recorder_clear, METH_NOARGS, "Forgets the record and the tensors it holds."},
    {nullptr, nullptr, 0, nullptr}};
PyType_Slot recorder_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(recorder_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(recorder_dealloc)},
    {Py_tp_methods, recorder_methods},
    {Py_sq_length, reinterpret_cast<void*>(recorder_length)},
    {Py_tp_doc, const_cast<char*>("Records every op that runs inside `with recorder:`.")},
    {0, nullptr}};
PyType_Spec recorder_spec = {"vibetensor._C.Recorder", sizeof(PyRecorder), 0, Py_TPFLAGS_DEFAULT,
                             recorder_slots};

// --- autocast

DeviceType device_type_arg(PyObject* name) { return parse_device(str_arg(name)).type; }

PyObject* set_autocast(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *name = nullptr, *dtype = nullptr;
    int enabled = 0;
    if (!PyArg_ParseTuple(args, "OpO", &name, &enabled, &dtype)) return nullptr;
    const DeviceType type = device_type_arg(name);
    const Object before_dtype = own(wrap_dtype(autocast::dtype(type)));
    PyObject* before = checked(
        Py_BuildValue("(NO)", PyBool_FromLong(autocast::enabled(type)), before_dtype.get()));
    if (dtype != Py_None) autocast::set_dtype(type, dtype_arg(dtype));
    autocast::set_enabled(type, enabled != 0);
    return before;
  });
}
PyObject* get_autocast(PyObject*, PyObject* name) {
  return guarded([&]() -> PyObject* {
    const DeviceType type = device_type_arg(name);
    const Object dtype = own(wrap_dtype(autocast::dtype(type)));
    return Py_BuildValue("(NO)", PyBool_FromLong(autocast::enabled(type)), dtype.get());
  });
}
PyObject* set_autocast_cache(PyObject*, PyObject* enabled) {
  return guarded([&]() -> PyObject* {
    const bool before = autocast::cache_enabled();
    autocast::set_cache_enabled(bool_arg(enabled));
    return PyBool_FromLong(before);
  });
}
PyObject* clear_autocast_cache(PyObject*, PyObject*) {
  autocast::clear_cache();
  return none();
}

PyMethodDef functions[] = {
    {"_set_override", set_override_function, METH_VARARGS,
     "_set_override(op, fn(original, name, args) or None)"},
    {"_push_mode", push_mode_function, METH_O, "_push_mode(fn(original, name, args))"},
    {"_pop_mode", pop_mode_function, METH_NOARGS, nullptr},
    {"_op_names", op_names, METH_NOARGS, "Every op and its capture class."},
    {"_set_autocast", set_autocast, METH_VARARGS,
     "_set_autocast(device_type, enabled, dtype or None) -> (enabled, dtype) before"},
    {"_get_autocast", get_autocast, METH_O, "_get_autocast(device_type) -> (enabled, dtype)"},
    {"_set_autocast_cache_enabled", set_autocast_cache, METH_O, nullptr},
    {"_clear_autocast_cache", clear_autocast_cache, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_dispatch(PyObject* module) {
  original_type = reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&original_spec)));
  PyObject* recorder = checked(PyType_FromSpec(&recorder_spec));
  if (PyModule_AddObject(module, "Recorder", recorder) < 0) throw PythonError();
  if (PyModule_AddFunctions(module, functions) < 0) throw PythonError();
}

}  // namespace vt::python
