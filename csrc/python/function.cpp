// autograd.Function: ops whose forward and backward are written in Python.
#include <algorithm>

#include "autograd/front.h"
#include "python/arguments.h"
#include "python/autograd.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace vt::python {
namespace {

using autograd::Node;

/// The node of one call. It owns the Python context; the context reaches the saved tensors through
/// a handle that goes dead with the node, so that the two do not keep each other alive.
class FunctionNode final : public Node {
 public:
  FunctionNode(PyObject* type, PyObject* context) : type_(type), context_(context) {
    Py_INCREF(type_);
    Py_INCREF(context_);
  }
  ~FunctionNode() override {
    if (!Py_IsInitialized()) return;
    const AcquireGil gil;
    // The context may outlive the call in user hands; it must not reach a dead node.
    if (PyObject_SetAttrString(context_, "_node", Py_None) < 0) PyErr_Clear();
    Py_DECREF(context_);
    Py_DECREF(type_);
  }

  std::string name() const override {
    const AcquireGil gil;
    const Object text(PyObject_GetAttrString(type_, "__name__"));
    return str(text ? str_arg(text.get()) : std::string_view("Function"), "Backward");
  }
  void release_saved() override {
    for (auto& saved : saved_) saved.release();
    released_ = true;
  }

  TensorVec apply(TensorVec grads) override {
    const AcquireGil gil;
    const Object materialize = own(PyObject_GetAttrString(context_, "materialize_grads"));
    const bool fill = PyObject_IsTrue(materialize.get()) == 1;
    Object args = own(PyTuple_New(static_cast<Py_ssize_t>(output_count)));
    for (size_t i = 0, k = 0; i < output_count; ++i) {
      Tensor grad;
      if (tensor_outputs[i]) {
        if (k < grads.size()) grad = grads[k];
        if (!grad.defined() && fill) {
          grad = ops::zeros(inputs[k].sizes, inputs[k].dtype, inputs[k].device);
        }
        ++k;
      }
      PyTuple_SetItem(args.get(), static_cast<Py_ssize_t>(i), checked(wrap(grad)));
    }
    const Object backward = own(PyObject_GetAttrString(type_, "_call_backward"));
    const Object result(
        PyObject_CallFunctionObjArgs(backward.get(), context_, args.get(), nullptr));
    if (!result) throw_python_error();
    const Object items = PyTuple_Check(result.get()) ? result : own(PyTuple_Pack(1, result.get()));
    const Py_ssize_t given = PyTuple_Size(items.get());
    const auto expected = static_cast<Py_ssize_t>(is_tensor_input.size());
    check(given >= expected, "function ", name(),
          " returned an incorrect number of gradients (expected ", expected, ", got ",
          int64_t{given}, ")");
    TensorVec out;
    for (Py_ssize_t i = 0; i < given; ++i) {
      PyObject* item = PyTuple_GetItem(items.get(), i);
      if (i >= expected || !is_tensor_input[static_cast<size_t>(i)]) {
        check(item == Py_None, "function ", name(),
              " returned a gradient different than None at position ", int64_t{i + 1},
              ", but the corresponding forward input was not a Variable");
        continue;
      }
      check(item == Py_None || is_tensor(item), "function ", name(),
            " returned a gradient that is not a Tensor at position ", int64_t{i + 1});
      out.push_back(item == Py_None ? Tensor() : tensor_of(item));
    }
    return out;
  }

  void save(const Tensor& tensor, bool is_output) { saved_.emplace_back().save(tensor, is_output); }
  std::vector<Tensor> unpack() const {
    check(!released_,
          "Trying to backward through the graph a second time (or directly access saved tensors "
          "after they have already "
          "been freed). Saved intermediate values of the graph are freed when you call .backward() "
          "or autograd.grad(). Specify "
          "retain_graph=True if you need to backward through the graph a second time.");
    std::vector<Tensor> out;
    for (const auto& saved : saved_) out.push_back(saved.unpack(this));
    return out;
  }

  std::vector<bool> is_tensor_input;
  std::vector<bool> tensor_outputs;
  size_t output_count = 0;

 private:
  PyObject* type_;
  PyObject* context_;
  std::vector<autograd::SavedTensor> saved_;
  bool released_ = false;
};

bool contains(PyObject* list, PyObject* object) {
  if (!list || list == Py_None) return false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(list); ++i) {
    if (PyTuple_GetItem(list, i) == object) return true;
  }
  return false;
}

/// Whether who calls this Function sees to changes of its outputs in place.
bool looks_after_changes(PyObject* type) {
  const Object flag = own(PyObject_GetAttrString(type, "_looks_after_changes"));
  return flag.get() == Py_True;
}

/// _apply_function(cls, ctx, args): runs forward and puts the call on the graph.
PyObject* apply_function(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *type = nullptr, *context = nullptr, *args = nullptr;
    if (!PyArg_ParseTuple(arguments, "OOO!", &type, &context, &PyTuple_Type, &args)) return nullptr;
    const Py_ssize_t n = PyTuple_Size(args);
    bool records = false;
    Object needs = own(PyTuple_New(n));
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* item = PyTuple_GetItem(args, i);
      const bool needed = is_tensor(item) && autograd::any_requires_grad(tensor_of(item));
      records |= needed;
      PyTuple_SetItem(needs.get(), i, PyBool_FromLong(needed));
    }
    records &= thread_state.grad_enabled;
    if (PyObject_SetAttrString(context, "needs_input_grad", needs.get()) < 0) return nullptr;

    Object result;
    {
      const NoGrad no_grad;
      const Object forward = own(PyObject_GetAttrString(type, "_call_forward"));
      result = own(PyObject_CallFunctionObjArgs(forward.get(), context, args, nullptr));
    }
    const bool single = !PyTuple_Check(result.get());
    const Object outputs = single ? own(PyTuple_Pack(1, result.get())) : result;
    const Py_ssize_t count = PyTuple_Size(outputs.get());
    const Object dirty = own(PyObject_GetAttrString(context, "dirty_tensors"));
    const Object detached = own(PyObject_GetAttrString(context, "non_differentiable"));
    const Object to_save = own(PyObject_GetAttrString(context, "to_save"));

    Ref<FunctionNode> node;
    if (records) {
      node = autograd::make_node<FunctionNode>(type, context);
      for (Py_ssize_t i = 0; i < n; ++i) {
        PyObject* item = PyTuple_GetItem(args, i);
        node->is_tensor_input.push_back(is_tensor(item));
        if (is_tensor(item)) autograd::add_edges(*node, tensor_of(item));
      }
      const Object py_node = own(wrap_node(node));
      // The handle is the node's address; valid while the node lives, None afterwards.
      const Object handle = own(PyLong_FromVoidPtr(node.get()));
      if (PyObject_SetAttrString(context, "_node", handle.get()) < 0) return nullptr;
    }

    Object wrapped = own(PyTuple_New(count));
    std::vector<std::pair<PyObject*, Tensor>> replaced;  // forward's object -> what the caller gets
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PyTuple_GetItem(outputs.get(), i);
      const bool tensor = is_tensor(item);
      if (node) {
        node->tensor_outputs.push_back(tensor);
        node->output_count = static_cast<size_t>(i) + 1;
      }
      if (!tensor) {
        PyTuple_SetItem(wrapped.get(), i, new_reference(item));
        continue;
      }
      const auto earlier = std::find_if(replaced.begin(), replaced.end(),
                                        [&](const auto& entry) { return entry.first == item; });
      if (earlier != replaced.end()) {
        // Given back twice it is one tensor, and its gradient that of the last place.
        if (node && autograd::grad_fn(earlier->second) == Ref<Node>(node))
          autograd::set_history(earlier->second, node);
        else if (node)
          node->add_input(earlier->second);
        PyTuple_SetItem(wrapped.get(), i, checked(wrap(earlier->second)));
        continue;
      }
      Tensor t = tensor_of(item);
      const bool is_input = contains(args, item);
      const bool is_dirty = contains(dirty.get(), item);
      if (is_dirty) {
        autograd::check_inplace(t, records, "Function.forward");
        autograd::rebase_history(t, node);
      } else {
        // An input handed back is a new tensor to autograd; a view made inside forward loses its
        // base.
        const bool is_view = t.impl()->autograd && t.impl()->autograd->base.defined();
        if (is_input || is_view || (t.impl()->autograd && records)) t = alias(t);
        if (node && !contains(detached.get(), item)) {
          autograd::set_history(t, node);
          if ((is_input || is_view) && !looks_after_changes(type))
            autograd::ensure_meta(t).created = autograd::AutogradMeta::Created::Function;
        } else if (node) {
          node->add_input(t);
        }
      }
      replaced.push_back({item, t});
      PyTuple_SetItem(wrapped.get(), i, checked(wrap(t)));
    }
    for (Py_ssize_t i = 0; dirty.get() != Py_None && i < PyTuple_Size(dirty.get()); ++i) {
      check(contains(outputs.get(), PyTuple_GetItem(dirty.get(), i)),
            "Some elements marked as dirty during the forward method were not returned as output. "
            "The inputs that are modified inplace must all be outputs of the Function.");
    }
    if (node && to_save.get() != Py_None) {
      for (Py_ssize_t i = 0; i < PyTuple_Size(to_save.get()); ++i) {
        PyObject* item = PyTuple_GetItem(to_save.get(), i);
        check_type(item == Py_None || is_tensor(item),
                   "save_for_backward can only save variables, but argument ", int64_t{i},
                   " is of another type");
        if (item == Py_None) {
          node->save(Tensor(), false);
          continue;
        }
        const auto found = std::find_if(replaced.begin(), replaced.end(),
                                        [&](const auto& entry) { return entry.first == item; });
        if (found == replaced.end())
          node->save(tensor_of(item), false);
        else
          node->save(found->second, autograd::grad_fn(found->second) == Ref<Node>(node));
      }
    }
    // What the context holds of its own outputs would never be given up.
    if (PyObject_SetAttrString(context, "to_save", node ? Py_None : to_save.get()) < 0 ||
        PyObject_SetAttrString(context, "dirty_tensors", Py_None) < 0 ||
        PyObject_SetAttrString(context, "non_differentiable", Py_None) < 0)
      return nullptr;
    return single ? new_reference(PyTuple_GetItem(wrapped.get(), 0)) : wrapped.release();
  });
}

/// _function_saved(handle): the tensors of ctx.saved_tensors.
PyObject* function_saved(PyObject*, PyObject* handle) {
  return guarded([&]() -> PyObject* {
    auto* node = static_cast<FunctionNode*>(PyLong_AsVoidPtr(handle));
    if (PyErr_Occurred()) return nullptr;
    return wrap(node->unpack());
  });
}

PyMethodDef functions[] = {{"_apply_function", apply_function, METH_VARARGS, nullptr},
                           {"_function_saved", function_saved, METH_O, nullptr},
                           {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_function(PyObject* module) {
  if (PyModule_AddFunctions(module, functions) < 0) throw PythonError();
}

}  // namespace vt::python
