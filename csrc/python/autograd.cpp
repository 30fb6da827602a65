// Autograd as Python sees it: tensor attributes, hooks, graph nodes, backward and grad.
#include "python/autograd.h"

#include <functional>

#include "autograd/engine.h"
#include "autograd/front.h"
#include "autograd/gradient_observer.h"
#include "core/rebinding.h"
#include "dispatch/consumer.h"
#include "python/arguments.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace vt::python {

using autograd::AutogradMeta;
using autograd::ensure_meta;
using autograd::Node;

PyTypeObject* node_type = nullptr;
PyTypeObject* handle_type = nullptr;

namespace {

/// A Python callable owned by C++; dropped safely from any thread.
class Callable {
 public:
  explicit Callable(PyObject* object) : object_(object) { Py_INCREF(object_); }
  ~Callable() {
    if (Py_IsInitialized()) release_anywhere(object_);
  }
  Callable(const Callable&) = delete;
  Callable& operator=(const Callable&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

class PyTensorHook final : public autograd::TensorHook {
 public:
  explicit PyTensorHook(PyObject* function) : function_(function) {}
  PyObject* function() const { return function_.get(); }
  Tensor call(const Tensor& grad) override {
    const AcquireGil gil;
    const Object arg = own(wrap(grad));
    const Object result(PyObject_CallFunctionObjArgs(function_.get(), arg.get(), nullptr));
    if (!result) throw_python_error();
    if (result.get() == Py_None) return {};
    check_type(is_tensor(result.get()), "a tensor hook must return None or a Tensor");
    const Tensor changed = tensor_of(result.get());
    check(equal(changed.sizes(), grad.sizes()),
          "a tensor hook has changed the size of the gradient: ", grad.sizes(), " to ",
          changed.sizes());
    check(changed.dtype() == grad.dtype() && changed.device() == grad.device(),
          "a tensor hook has changed the type of the gradient: ", grad.dtype(), " on ",
          grad.device(), " to ", changed.dtype(), " on ", changed.device());
    return changed;
  }

 private:
  Callable function_;
};

class PyPostAccumulateHook final : public autograd::PostAccumulateHook {
 public:
  explicit PyPostAccumulateHook(PyObject* function) : function_(function) {}
  PyObject* function() const { return function_.get(); }
  void call(const Tensor& variable) override {
    const AcquireGil gil;
    const Object arg = own(wrap(variable));
    const Object result(PyObject_CallFunctionObjArgs(function_.get(), arg.get(), nullptr));
    if (!result) throw_python_error();
  }

 private:
  Callable function_;
};

Object grads_tuple(const TensorVec& grads) {
  Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(grads.size())));
  for (size_t i = 0; i < grads.size(); ++i) {
    PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), checked(wrap(grads[i])));
  }
  return tuple;
}

class PyNodeHook final : public autograd::NodeHook {
 public:
  explicit PyNodeHook(PyObject* function) : function_(function) {}
  void call(TensorVec& grads, const TensorVec* outputs) override {
    const AcquireGil gil;
    const Object first = grads_tuple(grads);
    const Object second = outputs ? grads_tuple(*outputs) : Object();
    const Object result(
        PyObject_CallFunctionObjArgs(function_.get(), first.get(), second.get(), nullptr));
    if (!result) throw_python_error();
    if (result.get() == Py_None) return;
    const Object items = PyTuple_Check(result.get()) ? result : own(PyTuple_Pack(1, result.get()));
    check(PyTuple_Size(items.get()) == static_cast<Py_ssize_t>(grads.size()),
          "a node hook must return as many gradients as it got (", grads.size(), ")");
    for (size_t i = 0; i < grads.size(); ++i) {
      PyObject* item = PyTuple_GetItem(items.get(), static_cast<Py_ssize_t>(i));
      check_type(item == Py_None || is_tensor(item),
                 "a node hook returns Tensors or None, but this one returned ", type_name(item));
      grads[i] = item == Py_None ? Tensor() : tensor_of(item);
    }
  }

 private:
  Callable function_;
};

class PackedObject final : public RefCounted {
 public:
  explicit PackedObject(PyObject* object) : object(object) {}
  Callable object;
};
class PySavedHooks final : public autograd::SavedTensorHooks {
 public:
  PySavedHooks(PyObject* pack, PyObject* unpack) : pack_(pack), unpack_(unpack) {}
  Ref<RefCounted> pack(const Tensor& tensor) override {
    const AcquireGil gil;
    const Object arg = own(wrap(tensor));
    const Object packed(PyObject_CallFunctionObjArgs(pack_.get(), arg.get(), nullptr));
    if (!packed) throw_python_error();
    return make_ref<PackedObject>(packed.get());
  }
  Tensor unpack(const Ref<RefCounted>& packed) override {
    const AcquireGil gil;
    PyObject* object = static_cast<PackedObject*>(packed.get())->object.get();
    const Object result(PyObject_CallFunctionObjArgs(unpack_.get(), object, nullptr));
    if (!result) throw_python_error();
    check_type(is_tensor(result.get()),
               "Output of saved tensor unpack_hook expected to be a Tensor");
    return tensor_of(result.get());
  }

 private:
  Callable pack_, unpack_;
};

// --- removable handles

struct PyHandle {
  PyObject_HEAD std::function<void()> remove;
};
PyObject* make_handle(std::function<void()> remove) {
  PyObject* self = checked(PyType_GenericAlloc(handle_type, 0));
  new (&reinterpret_cast<PyHandle*>(self)->remove) std::function<void()>(std::move(remove));
  return self;
}
void handle_dealloc(PyObject* self) {
  reinterpret_cast<PyHandle*>(self)->remove.~function();
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}
PyObject* handle_remove(PyObject* self, PyObject*) {
  auto& remove = reinterpret_cast<PyHandle*>(self)->remove;
  if (remove) std::exchange(remove, nullptr)();
  return none();
}
PyObject* handle_enter(PyObject* self, PyObject*) { return new_reference(self); }
PyObject* handle_exit(PyObject* self, PyObject*) { return handle_remove(self, nullptr); }
PyMethodDef handle_methods[] = {{"remove", handle_remove, METH_NOARGS, "Takes the hook away."},
                                {"__enter__", handle_enter, METH_NOARGS, nullptr},
                                {"__exit__", handle_exit, METH_VARARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
PyType_Slot handle_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
                              {Py_tp_methods, handle_methods},
                              {0, nullptr}};
PyType_Spec handle_spec = {"vibetensor._C.RemovableHandle", sizeof(PyHandle), 0, Py_TPFLAGS_DEFAULT,
                           handle_slots};

/// A handle of a hook that `owner` holds; `list_of(owner)` is where. It keeps the hook alive, and
/// neither the owner nor what that belongs to.
template <class Owner, class H, class ListOf>
PyObject* handle_of(Owner& owner, Ref<H> hook, ListOf list_of, bool of_leaf) {
  hook->set_owner(&owner);
  return make_handle([hook = std::move(hook), list_of, of_leaf] {
    hook->with_owner([&](void* now) {
      std::erase_if(list_of(*static_cast<Owner*>(now)), [&](const auto& entry) {
        if constexpr (requires { entry.second; })
          return entry.second == hook;
        else
          return entry == hook;
      });
    });
    hook->set_owner(nullptr);
    if (of_leaf) note_rebinding();
  });
}

// --- nodes

struct PyNode {
  PyObject_HEAD Ref<Node> node;
};
Node& node_of(PyObject* self) { return *reinterpret_cast<PyNode*>(self)->node; }

void node_dealloc(PyObject* self) {
  auto& node = reinterpret_cast<PyNode*>(self)->node;
  if (node->extras && node->extras->python_object == self) node->extras->python_object = nullptr;
  node.~Ref();
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}
PyObject* node_name(PyObject* self, PyObject*) {
  return PyUnicode_FromString(node_of(self).name().c_str());
}
PyObject* node_repr(PyObject* self) {
  return PyUnicode_FromFormat("<%s object at %p>", node_of(self).name().c_str(),
                              static_cast<void*>(self));
}
PyObject* node_next_functions(PyObject* self, void*) {
  return guarded([&]() -> PyObject* {
    const Node& node = node_of(self);
    Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(node.edges.size())));
    for (size_t i = 0; i < node.edges.size(); ++i) {
      const Object fn = own(wrap_node(node.edges[i].fn));
      PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i),
                      checked(Py_BuildValue("(OI)", fn.get(), node.edges[i].nr)));
    }
    return tuple.release();
  });
}
PyObject* node_variable(PyObject* self, void*) {
  return guarded([&]() -> PyObject* {
    auto* leaf = dynamic_cast<autograd::AccumulateGrad*>(&node_of(self));
    if (!leaf)
      fail(ErrorKind::Attribute, "'", node_of(self).name(), "' object has no attribute 'variable'");
    return wrap(leaf->variable);
  });
}
PyObject* node_sequence(PyObject* self, PyObject*) {
  return PyLong_FromUnsignedLongLong(node_of(self).sequence);
}
PyObject* node_add_hook(PyObject* self, PyObject* function, bool before) {
  return guarded([&]() -> PyObject* {
    check_type(PyCallable_Check(function), "register_hook expects a callable");
    const Ref<Node> node = reinterpret_cast<PyNode*>(self)->node;
    const Ref<autograd::NodeHook> hook(new PyNodeHook(function));
    const auto list_of = [before](autograd::NodeExtras& extras) -> auto& {
      return before ? extras.pre_hooks : extras.post_hooks;
    };
    list_of(node->ensure_extras()).push_back(hook);
    if (node->is_leaf()) note_rebinding();
    return handle_of(*node->extras, hook, list_of, node->is_leaf());
  });
}
PyObject* node_register_hook(PyObject* self, PyObject* function) {
  return node_add_hook(self, function, false);
}
PyObject* node_register_prehook(PyObject* self, PyObject* function) {
  return node_add_hook(self, function, true);
}

PyMethodDef node_methods[] = {
    {"name", node_name, METH_NOARGS, "The node's name, e.g. 'MulBackward0'."},
    {"register_hook", node_register_hook, METH_O,
     "register_hook(fn(grad_inputs, grad_outputs)): after the node ran."},
    {"register_prehook", node_register_prehook, METH_O,
     "register_prehook(fn(grad_outputs)): before the node runs."},
    {"_sequence_nr", node_sequence, METH_NOARGS, "Order of creation."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef node_properties[] = {
    {"next_functions", node_next_functions, nullptr,
     "Pairs (node, input index) that receive this node's gradients.", nullptr},
    {"variable", node_variable, nullptr, "The leaf of an AccumulateGrad node.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot node_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(node_dealloc)},
                            {Py_tp_repr, reinterpret_cast<void*>(node_repr)},
                            {Py_tp_methods, node_methods},
                            {Py_tp_getset, node_properties},
                            {Py_tp_doc, const_cast<char*>("A node of the autograd graph.")},
                            {0, nullptr}};
PyType_Spec node_spec = {"vibetensor._C.Node", sizeof(PyNode), 0, Py_TPFLAGS_DEFAULT, node_slots};

// --- tensor attributes

bool is_leaf(const Tensor& t) { return !autograd::grad_fn(t); }

PyObject* get_requires_grad(PyObject* self, void*) {
  return PyBool_FromLong(autograd::any_requires_grad(tensor_of(self)));
}
void set_requires_grad(const Tensor& t, bool value) {
  check(is_leaf(t) || value,
        "you can only change requires_grad flags of leaf variables. If you want to use a computed "
        "variable in "
        "a subgraph that doesn't require differentiation use var_no_grad = var.detach().");
  if (!is_leaf(t)) return;
  check(!value || is_floating(t.dtype()),
        "only Tensors of floating point dtype can require gradients (got ", t.dtype(), ")");
  check(!value || !t.impl()->inference || thread_state.inference_mode,
        "Setting requires_grad=True on inference tensor outside InferenceMode is not allowed.");
  if (t.impl()->requires_grad == value) return;
  autograd::note_tensor_changes(t);
  t.impl()->requires_grad = value;
  note_rebinding();
}
template <class F>
int set(PyObject* value, const char* name, F&& f) {
  try {
    if (!value) fail(ErrorKind::Runtime, "cannot delete attribute '", name, "'");
    f();
    return 0;
  } catch (...) {
    raise_current();
    return -1;
  }
}
int put_requires_grad(PyObject* self, PyObject* value, void*) {
  return set(value, "requires_grad", [&] {
    check(PyBool_Check(value), "requires_grad must be a bool, got ", type_name(value));
    set_requires_grad(tensor_of(self), value == Py_True);
  });
}
/// A recorded step depends on every .grad that it reads or sets, not on those of backward alone.
void tell_recording(const Tensor& t) {
  if (thread_state.consumer && is_leaf(t)) [[unlikely]]
    thread_state.consumer->on_gradient(t);
}
PyObject* get_grad(PyObject* self, void*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    tell_recording(t);
    const AutogradMeta* meta = t.impl()->autograd.get();
    return meta ? wrap(meta->grad) : none();
  });
}
int put_grad(PyObject* self, PyObject* value, void*) {
  try {
    const Tensor& t = tensor_of(self);
    if (auto* observer = autograd::gradient_observer()) [[unlikely]]
      observer->gradient_changes(t, t.impl()->autograd ? t.impl()->autograd->grad : Tensor());
    if (!value || value == Py_None) {
      tell_recording(t);
      if (t.impl()->autograd) t.impl()->autograd->grad.reset();
      return 0;
    }
    check_type(is_tensor(value),
               "assigned grad expected to be a Tensor or None but got grad of another type");
    const Tensor& grad = tensor_of(value);
    check(!grad.is_same(t), "can't assign Variable as its own grad");
    check(grad.dtype() == t.dtype(), "assigned grad has data of a different type: ", grad.dtype(),
          " for a tensor of ", t.dtype());
    check(grad.device() == t.device(), "assigned grad has data located on a different device");
    check(equal(grad.sizes(), t.sizes()),
          "assigned grad has data of a different size: ", grad.sizes(), " for a tensor of ",
          t.sizes());
    tell_recording(t);
    ensure_meta(t).grad = grad;
    return 0;
  } catch (...) {
    raise_current();
    return -1;
  }
}
PyObject* get_grad_fn(PyObject* self, void*) {
  return guarded([&]() -> PyObject* { return wrap_node(autograd::grad_fn(tensor_of(self))); });
}
PyObject* get_is_leaf(PyObject* self, void*) { return PyBool_FromLong(is_leaf(tensor_of(self))); }
PyObject* get_data(PyObject* self, void*) {
  return guarded([&]() -> PyObject* {
    const Tensor out = alias(tensor_of(self));
    out.impl()->own_version = make_ref<VersionCounter>();
    out.impl()->version = &out.impl()->own_version->value;
    return wrap(out);
  });
}
int put_data(PyObject* self, PyObject* value, void*) {
  return set(value, "data", [&] {
    check_type(is_tensor(value), "Variable data has to be a tensor");
    TensorImpl* to = tensor_of(self).impl();
    TensorImpl* from = tensor_of(value).impl();
    check(to->dtype == from->dtype || !to->requires_grad || is_floating(from->dtype),
          "data set to a tensor that requires gradients must be "
          "floating point");
    autograd::note_tensor_changes(tensor_of(self));
    if (!to->own_version) {
      // The counter outlives the storage it came with.
      to->own_version = make_ref<VersionCounter>();
      to->own_version->value.store(to->version->load());
      to->version = &to->own_version->value;
    }
    if (to->dtype != from->dtype || to->device != from->device)
      autograd::renew_accumulator(tensor_of(self));
    to->storage = from->storage;
    to->dtype = from->dtype;
    to->device = from->device;
    to->set_geometry(from->sizes, from->strides, from->offset);
    note_rebinding();
  });
}
PyObject* get_version(PyObject* self, void*) {
  return PyLong_FromUnsignedLong(tensor_of(self).version());
}
PyObject* get_output_nr(PyObject* self, void*) {
  const AutogradMeta* meta = tensor_of(self).impl()->autograd.get();
  return PyLong_FromUnsignedLong(meta ? meta->output_nr : 0);
}
PyObject* get_base(PyObject* self, void*) {
  const AutogradMeta* meta = tensor_of(self).impl()->autograd.get();
  return meta ? wrap(meta->base) : none();
}
PyObject* get_retains_grad(PyObject* self, void*) {
  const AutogradMeta* meta = tensor_of(self).impl()->autograd.get();
  return PyBool_FromLong(meta && meta->retains_grad);
}

PyObject* method_is_view(PyObject* self, PyObject*) {
  const AutogradMeta* meta = tensor_of(self).impl()->autograd.get();
  return PyBool_FromLong(meta && meta->base.defined());
}
PyObject* method_is_inference(PyObject* self, PyObject*) {
  return PyBool_FromLong(tensor_of(self).impl()->inference);
}
PyObject* method_requires_grad_(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                                PyObject* kwnames) {
  return guarded([&]() -> PyObject* {
    const Py_ssize_t named = kwnames ? PyTuple_Size(kwnames) : 0;
    check_type(nargs + named <= 1, "requires_grad_() takes at most 1 argument, got ",
               int64_t{nargs + named});
    if (named == 1) {
      const std::string_view name = str_arg(PyTuple_GetItem(kwnames, 0));
      check_type(name == "requires_grad", "requires_grad_() got an unexpected keyword argument '",
                 name, "'");
    }
    check_type(nargs + named == 0 || PyBool_Check(args[0]),
               "requires_grad_(): argument 'requires_grad' must be bool, not ",
               nargs + named == 0 ? "" : type_name(args[0]));
    set_requires_grad(tensor_of(self), nargs + named == 0 || args[0] == Py_True);
    return new_reference(self);
  });
}
PyObject* method_retain_grad(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Tensor& t = tensor_of(self);
    check(autograd::any_requires_grad(t),
          "can't retain_grad on Tensor that has requires_grad=False");
    if (is_leaf(t)) return none();
    AutogradMeta& meta = ensure_meta(t);
    if (meta.retains_grad) return none();
    meta.retains_grad = true;
    meta.owner = t.impl();
    meta.grad_fn->ensure_extras().retain_grad.push_back({meta.output_nr, t.impl()});
    return none();
  });
}
PyObject* method_register_hook(PyObject* self, PyObject* function) {
  return guarded([&]() -> PyObject* {
    const Tensor t = tensor_of(self);
    check(autograd::any_requires_grad(t),
          "cannot register a hook on a tensor that doesn't require gradient");
    check_type(PyCallable_Check(function), "register_hook expects a callable");
    const Ref<autograd::TensorHook> hook(new PyTensorHook(function));
    if (const Ref<Node> node = autograd::grad_fn(t)) {
      node->ensure_extras().tensor_hooks.push_back({t.impl()->autograd->output_nr, hook});
      const auto list_of = [](autograd::NodeExtras& e) -> auto& { return e.tensor_hooks; };
      return handle_of(*node->extras, hook, list_of, false);
    }
    AutogradMeta& meta = ensure_meta(t);
    meta.hooks.push_back(hook);
    note_rebinding();
    return handle_of(meta, hook, [](AutogradMeta& m) -> auto& { return m.hooks; }, true);
  });
}
PyObject* method_register_post_accumulate(PyObject* self, PyObject* function) {
  return guarded([&]() -> PyObject* {
    const Tensor t = tensor_of(self);
    check(autograd::any_requires_grad(t),
          "cannot register a hook on a tensor that doesn't require gradient");
    check(is_leaf(t), "post accumulate grad hooks cannot be registered on non-leaf tensors");
    const Ref<autograd::PostAccumulateHook> hook(new PyPostAccumulateHook(function));
    AutogradMeta& meta = ensure_meta(t);
    meta.post_accumulate_hooks.push_back(hook);
    note_rebinding();
    const auto list_of = [](AutogradMeta& m) -> auto& { return m.post_accumulate_hooks; };
    return handle_of(meta, hook, list_of, true);
  });
}
PyObject* method_make_subclass(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *type = nullptr, *data = nullptr;
    int requires_grad = 0;
    if (!PyArg_ParseTuple(args, "OO|p", &type, &data, &requires_grad)) return nullptr;
    check_type(PyType_Check(type) && is_tensor(data),
               "_make_subclass(cls, data, requires_grad=False) expects a Tensor type and a Tensor");
    const Tensor out = alias(tensor_of(data));
    const Object result = own(wrap_as(reinterpret_cast<PyTypeObject*>(type), out));
    if (requires_grad) set_requires_grad(out, true);
    return new_reference(result.get());
  });
}

// --- module functions

/// A sequence of Tensors, or of Tensors and None; None is an empty one.
std::vector<Tensor> tensors_arg(PyObject* object, const char* what, bool none_allowed = false) {
  std::vector<Tensor> out;
  if (object == Py_None) return out;
  check_type(PySequence_Check(object), what, " must be Tensors, got ", type_name(object));
  const Object items = own(PySequence_Tuple(object));
  for (Py_ssize_t i = 0; i < PyTuple_Size(items.get()); ++i) {
    PyObject* item = PyTuple_GetItem(items.get(), i);
    const bool none = item == Py_None && none_allowed;
    check_type(none || is_tensor(item), what, " must be Tensors", none_allowed ? " or None" : "",
               ", but number ", i, " is ", type_name(item));
    out.push_back(none ? Tensor() : tensor_of(item));
  }
  return out;
}

PyObject* backward_function(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *roots = nullptr, *grads = nullptr, *inputs = nullptr;
    int retain = 0, create = 0;
    if (!PyArg_ParseTuple(args, "OOppO", &roots, &grads, &retain, &create, &inputs)) return nullptr;
    check_type(roots != Py_None, "backward: what to differentiate must be Tensors, not None");
    const auto r = tensors_arg(roots, "backward: what to differentiate"),
               g = tensors_arg(grads, "backward: gradients", true),
               i = tensors_arg(inputs, "backward: inputs");
    ReleaseGil gil(ReleaseGil::kWorthwhile);
    autograd::backward(r, g, i, {retain != 0, create != 0, true});
    gil.reacquire();
    return none();
  });
}
PyObject* grad_function(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *roots = nullptr, *grads = nullptr, *inputs = nullptr;
    int retain = 0, create = 0, unused = 0;
    if (!PyArg_ParseTuple(args, "OOOppp", &roots, &grads, &inputs, &retain, &create, &unused))
      return nullptr;
    const auto r = tensors_arg(roots, "grad: outputs"),
               g = tensors_arg(grads, "grad: grad_outputs", true),
               i = tensors_arg(inputs, "grad: inputs");
    ReleaseGil gil(ReleaseGil::kWorthwhile);
    const auto found = autograd::grad(r, g, i, {retain != 0, create != 0, unused != 0});
    gil.reacquire();
    return wrap(found);
  });
}
PyObject* is_grad_enabled(PyObject*, PyObject*) {
  return PyBool_FromLong(thread_state.grad_enabled);
}
PyObject* set_grad_enabled(PyObject*, PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) return nullptr;
  thread_state.grad_enabled = truth != 0;
  return none();
}
PyObject* is_inference(PyObject*, PyObject*) {
  return PyBool_FromLong(thread_state.inference_mode);
}
PyObject* set_inference(PyObject*, PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) return nullptr;
  thread_state.inference_mode = truth != 0;
  return none();
}
PyObject* set_anomaly(PyObject*, PyObject* args) {
  int enabled = 0, nan = 1;
  if (!PyArg_ParseTuple(args, "pp", &enabled, &nan)) return nullptr;
  thread_state.anomaly_enabled = enabled != 0;
  thread_state.anomaly_check_nan = nan != 0;
  return none();
}
PyObject* get_anomaly(PyObject*, PyObject*) {
  return Py_BuildValue("(NN)", PyBool_FromLong(thread_state.anomaly_enabled),
                       PyBool_FromLong(thread_state.anomaly_check_nan));
}
PyObject* in_backward_for_inputs(PyObject*, PyObject*) {
  return PyBool_FromLong(autograd::in_backward_for_inputs());
}
PyObject* push_saved_hooks(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *pack = nullptr, *unpack = nullptr;
    if (!PyArg_ParseTuple(args, "OO", &pack, &unpack)) return nullptr;
    auto* hooks = new PySavedHooks(pack, unpack);
    hooks->add_ref();
    hooks->outer = thread_state.saved_hooks;
    thread_state.saved_hooks = hooks;
    return none();
  });
}
PyObject* pop_saved_hooks(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    check(thread_state.saved_hooks != nullptr,
          "saved_tensors_hooks: none is active on this thread");
    auto* hooks = thread_state.saved_hooks;
    thread_state.saved_hooks = hooks->outer;
    hooks->release();
    return none();
  });
}
PyObject* live_counts(PyObject*, PyObject*) {
  return Py_BuildValue("{s:L,s:L,s:L}", "storages", static_cast<long long>(Storage::live_count()),
                       "tensors", static_cast<long long>(TensorImpl::live_count()), "nodes",
                       static_cast<long long>(Node::live_count()));
}
PyObject* gradient_edge(PyObject*, PyObject* tensor) {
  return guarded([&]() -> PyObject* {
    check_type(is_tensor(tensor), "get_gradient_edge expects a Tensor");
    const autograd::Edge edge = autograd::gradient_edge(tensor_of(tensor));
    check(
        edge.valid(),
        "It is not possible to get the gradient edge for a Tensor that does not require gradients");
    const Object node = own(wrap_node(edge.fn));
    return Py_BuildValue("(OI)", node.get(), edge.nr);
  });
}

PyObject* increment_version(PyObject*, PyObject* tensor) {
  return guarded([&]() -> PyObject* {
    check_type(is_tensor(tensor), "increment_version expects a Tensor, got ", type_name(tensor));
    tensor_of(tensor).bump_version();
    return none();
  });
}

PyObject* forget_history(PyObject*, PyObject* object) {
  return guarded([&]() -> PyObject* {
    check_type(is_tensor(object), "_forget_history expects a Tensor");
    const Tensor& t = tensor_of(object);
    autograd::note_tensor_changes(t);
    if (t.impl()->autograd) autograd::set_grad_fn(t, {}, 0);
    t.impl()->requires_grad = false;
    note_rebinding();
    return none();
  });
}

PyMethodDef functions[] = {
    {"_forget_history", forget_history, METH_O,
     "Makes a tensor a leaf that does not require grad."},
    {"_backward", backward_function, METH_VARARGS,
     "_backward(roots, grads, retain_graph, create_graph, inputs)"},
    {"_grad", grad_function, METH_VARARGS,
     "_grad(roots, grads, inputs, retain_graph, create_graph, allow_unused)"},
    {"is_grad_enabled", is_grad_enabled, METH_NOARGS,
     "Whether ops are recorded for backward on this thread."},
    {"_set_grad_enabled", set_grad_enabled, METH_O, nullptr},
    {"is_inference_mode_enabled", is_inference, METH_NOARGS, "Whether inference mode is on."},
    {"_set_inference_mode", set_inference, METH_O, nullptr},
    {"_in_backward_for_inputs", in_backward_for_inputs, METH_NOARGS, nullptr},
    {"_set_anomaly", set_anomaly, METH_VARARGS, nullptr},
    {"_get_anomaly", get_anomaly, METH_NOARGS, nullptr},
    {"_push_saved_hooks", push_saved_hooks, METH_VARARGS, nullptr},
    {"_pop_saved_hooks", pop_saved_hooks, METH_NOARGS, nullptr},
    {"_live_counts", live_counts, METH_NOARGS,
     "Live storages, tensors and graph nodes in the process."},
    {"_gradient_edge", gradient_edge, METH_O, nullptr},
    {"_increment_version", increment_version, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};

std::string python_trace() {
  const AcquireGil gil;
  const Object module(PyImport_ImportModule("traceback"));
  const Object lines(module ? PyObject_CallMethod(module.get(), "format_stack", nullptr) : nullptr);
  std::string out;
  if (lines) {
    for (Py_ssize_t i = 0; i < PyList_Size(lines.get()); ++i)
      out += str_arg(PyList_GetItem(lines.get(), i));
  }
  PyErr_Clear();
  return out;
}

}  // namespace

PyObject* wrap_node(const Ref<Node>& node) {
  if (!node) return none();
  auto& extras = node->ensure_extras();
  if (extras.python_object) return new_reference(static_cast<PyObject*>(extras.python_object));
  PyObject* self = checked(PyType_GenericAlloc(node_type, 0));
  new (&reinterpret_cast<PyNode*>(self)->node) Ref<Node>(node);
  extras.python_object = self;
  return self;
}

PyMethodDef tensor_autograd_methods[] = {
    {"requires_grad_", as_cfunction(method_requires_grad_), METH_FASTCALL | METH_KEYWORDS,
     "requires_grad_(requires_grad=True): sets the flag in place; returns self."},
    {"retain_grad", method_retain_grad, METH_NOARGS, "Keeps .grad of a non-leaf during backward."},
    {"register_hook", method_register_hook, METH_O,
     "register_hook(fn(grad)): called when the gradient is computed."},
    {"register_post_accumulate_grad_hook", method_register_post_accumulate, METH_O,
     "register_post_accumulate_grad_hook(fn(tensor)): called after .grad was accumulated."},
    {"_is_view", method_is_view, METH_NOARGS, "Whether this tensor is a view of another."},
    {"is_inference", method_is_inference, METH_NOARGS, "Whether it was made under inference_mode."},
    {"_make_subclass", method_make_subclass, METH_VARARGS | METH_STATIC,
     "_make_subclass(cls, data, requires_grad=False)"},
    {nullptr, nullptr, 0, nullptr}};

PyObject* array_interface(PyObject* self, void*);
PyGetSetDef tensor_properties[] = {
    {"requires_grad", get_requires_grad, put_requires_grad,
     "Whether gradients are computed for this tensor.", nullptr},
    {"grad", get_grad, put_grad, "The accumulated gradient, or None.", nullptr},
    {"grad_fn", get_grad_fn, nullptr, "The node that made this tensor, or None for leaves.",
     nullptr},
    {"is_leaf", get_is_leaf, nullptr, "True unless made by a recorded op.", nullptr},
    {"data", get_data, put_data, "The same memory, outside autograd.", nullptr},
    {"_version", get_version, nullptr, "Counts in-place changes.", nullptr},
    {"output_nr", get_output_nr, nullptr, "Which output of grad_fn this is.", nullptr},
    {"_base", get_base, nullptr, "The tensor this one views, or None.", nullptr},
    {"retains_grad", get_retains_grad, nullptr, "True if retain_grad() was called on a non-leaf.",
     nullptr},
    {"__array_interface__", array_interface, nullptr, "NumPy's view of the memory.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

int visit_hooks(const Tensor& t, visitproc visit, void* arg) {
  // Of what others hold too Python cannot know whether it is in use.
  const TensorImpl* impl = t.impl();
  if (!impl || impl->use_count() != 1 || !impl->autograd) return 0;
  const auto visit_all = [&]<class H>(const auto& hooks) {
    for (const auto& hook : hooks) {
      if (const auto* ours = dynamic_cast<const H*>(hook.get()); ours && hook->use_count() == 1)
        Py_VISIT(ours->function());
    }
    return 0;
  };
  const int stop = visit_all.operator()<PyTensorHook>(impl->autograd->hooks);
  return stop ? stop
              : visit_all.operator()<PyPostAccumulateHook>(impl->autograd->post_accumulate_hooks);
}

void clear_hooks(const Tensor& t) {
  TensorImpl* impl = t.impl();
  if (impl && impl->use_count() == 1 && impl->autograd) impl->autograd->drop_hooks();
}

void add_autograd(PyObject* module) {
  node_type = reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&node_spec)));
  handle_type = reinterpret_cast<PyTypeObject*>(checked(PyType_FromSpec(&handle_spec)));
  Py_INCREF(reinterpret_cast<PyObject*>(node_type));
  if (PyModule_AddObject(module, "Node", reinterpret_cast<PyObject*>(node_type)) < 0)
    throw PythonError();
  Py_INCREF(reinterpret_cast<PyObject*>(handle_type));
  if (PyModule_AddObject(module, "RemovableHandle", reinterpret_cast<PyObject*>(handle_type)) < 0)
    throw PythonError();
  if (PyModule_AddFunctions(module, functions) < 0) throw PythonError();
  autograd::forward_trace = python_trace;
  autograd::note_foreign_error = add_note_to_python_error;
}

}  // namespace vt::python
