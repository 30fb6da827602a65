#include "python/call_key.h"

#include <algorithm>

#include "autograd/front.h"
#include "core/device_backend.h"
#include "core/kernel_switches.h"
#include "dispatch/default_device.h"
#include "dispatch/thread_state.h"
#include "python/arguments.h"
#include "python/array_interface.h"
#include "python/tensor_type.h"
#include "python/watch.h"

namespace vt::python {
namespace {

constexpr int kContiguous = 0x1, kAligned = 0x100, kNativeOrder = 0x200;  // NumPy's flags

/// The array behind an object; the argument is left without one where it has none that can be read
/// as it lies.
void find_array(Argument& argument) {
  static PyObject* const name = PyUnicode_InternFromString("__array_struct__");
  argument.capsule = Object(PyObject_GetAttr(argument.object.get(), name));
  if (argument.capsule && PyCapsule_CheckExact(argument.capsule.get())) {
    const auto* array =
        static_cast<const ArrayStruct*>(PyCapsule_GetPointer(argument.capsule.get(), nullptr));
    constexpr int wanted = kContiguous | kAligned | kNativeOrder;
    if (array && array->two == 2 && (array->flags & wanted) == wanted) argument.array = array;
  }
  if (!argument.array) PyErr_Clear();
}

/// Whether an object that does not change is known by its identity or its value alone.
bool is_constant(PyObject* object) {
  if (object == Py_None || PyBool_Check(object) || PyFloat_CheckExact(object) ||
      PyLong_CheckExact(object) || PyUnicode_CheckExact(object) || PyBytes_CheckExact(object) ||
      is_dtype(object) || is_device(object))
    return true;
  // Compared by identity: what these do is watched, or theirs alone (functions).
  static const Object plain_hash =
      own(PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyBaseObject_Type), "__hash__"));
  const Object hash =
      own(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__hash__"));
  return hash.get() == plain_hash.get();
}

/// Whether two tensors on one storage are the same there.
bool are_twins(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.storage_offset() == b.storage_offset() &&
         equal(a.sizes(), b.sizes()) && equal(a.strides(), b.strides());
}

}  // namespace

CallKey::Modes CallKey::Modes::now() {
  const ThreadState& t = thread_state;
  const auto autocast = static_cast<uint8_t>(t.front & (kAutocastCpu | kAutocastCuda));
  return {t.grad_enabled,
          t.inference_mode,
          autocast,
          {t.autocast_dtype[0], t.autocast_dtype[1]},
          vt::default_dtype(),
          resolve_device(vt::default_device()),
          kernel_switches()};
}

bool CallKey::describe(PyObject* object, Leaf& leaf) {
  if (is_tensor(object)) {
    const Tensor& t = tensor_of(object);
    if (autograd::any_requires_grad(t)) {
      leaf.kind = Leaf::Kind::Trained;
      leaf.value = Object::borrow(object);
      return true;
    }
    leaf.kind = Leaf::Kind::Tensor;
    leaf.sizes = Dims(t.sizes());
    leaf.strides = Dims(t.strides());
    leaf.dtype = t.dtype();
    leaf.device = t.device();
    return true;
  }
  if (has_array_interface(object)) {
    Argument argument{Object::borrow(object), {}};
    find_array(argument);
    if (!argument.array) return false;
    leaf.kind = Leaf::Kind::Array;
    leaf.value = Object::borrow(reinterpret_cast<PyObject*>(Py_TYPE(object)));
    leaf.sizes = Dims(argument.array->shape, argument.array->shape + argument.array->dimensions);
    leaf.array_kind = argument.array->kind;
    leaf.item_size = argument.array->item_size;
    return true;
  }
  leaf.value = Object::borrow(object);
  return is_constant(object);
}

std::unique_ptr<CallKey> CallKey::make(PyObject* spec, PyObject* leaves) {
  check_type(PyList_Check(leaves), "a key is made from a list");
  std::optional<Structure> structure = Structure::parse(spec);
  if (!structure) return nullptr;
  auto made = std::make_unique<CallKey>();
  made->structure_ = std::move(*structure);
  made->modes_ = Modes::now();
  const Py_ssize_t n = PyList_Size(leaves);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* object = PyList_GetItem(leaves, i);
    Leaf leaf;
    if (!describe(object, leaf)) return nullptr;
    leaf.first = leaf.twin = static_cast<size_t>(i);
    for (Py_ssize_t j = i - 1; j >= 0 && is_tensor(object); --j) {
      PyObject* other = PyList_GetItem(leaves, j);
      if (!is_tensor(other) || tensor_of(other).storage() != tensor_of(object).storage()) continue;
      leaf.first = static_cast<size_t>(j);
      const Leaf& known = made->leaves_[leaf.first];
      if (known.kind == leaf.kind && are_twins(tensor_of(other), tensor_of(object)))
        leaf.twin = leaf.first;
    }
    made->leaves_.push_back(std::move(leaf));
  }
  return made;
}

bool CallKey::accepts(const Leaf& leaf, Argument& argument) {
  PyObject* object = argument.object.get();
  switch (leaf.kind) {
    case Leaf::Kind::Constant:
      return same_value(object, leaf.value.get());
    case Leaf::Kind::Trained:
      return object == leaf.value.get() && autograd::any_requires_grad(tensor_of(object));
    case Leaf::Kind::Tensor: {
      if (!is_tensor(object)) return false;
      const Tensor& t = tensor_of(object);
      return t.dtype() == leaf.dtype && t.device() == leaf.device && equal(t.sizes(), leaf.sizes) &&
             equal(t.strides(), leaf.strides) && !autograd::any_requires_grad(t);
    }
    case Leaf::Kind::Array: {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != leaf.value.get()) return false;
      find_array(argument);
      const ArrayStruct* array = argument.array;
      return array && array->kind == leaf.array_kind && array->item_size == leaf.item_size &&
             static_cast<size_t>(array->dimensions) == leaf.sizes.size() &&
             std::equal(leaf.sizes.begin(), leaf.sizes.end(), array->shape);
    }
  }
  return false;
}

bool CallKey::same_aliases(const Leaves& leaves) const {
  SmallVector<const Storage*, 16> apart;
  for (size_t i = 0; i < leaves_.size(); ++i) {
    const Leaf& leaf = leaves_[i];
    if (leaf.kind != Leaf::Kind::Tensor && leaf.kind != Leaf::Kind::Trained) continue;
    const Storage* storage = tensor_of(leaves[i]).storage().get();
    if (leaf.first == i) {
      apart.push_back(storage);
    } else if (storage != tensor_of(leaves[leaf.first]).storage().get()) {
      return false;
    } else if (leaf.kind == Leaf::Kind::Tensor && !same_twin(leaves, i)) {
      return false;
    }
  }
  std::sort(apart.begin(), apart.end());
  return std::adjacent_find(apart.begin(), apart.end()) == apart.end();
}

bool CallKey::same_twin(const Leaves& leaves, size_t at) const {
  const Leaf& leaf = leaves_[at];
  for (size_t i = leaf.first; i < at; ++i) {
    if (leaves_[i].kind != Leaf::Kind::Tensor || leaves_[i].first != leaf.first) continue;
    if (are_twins(tensor_of(leaves[i]), tensor_of(leaves[at]))) return i == leaf.twin;
  }
  return leaf.twin == at;
}

bool CallKey::matches(PyObject* args, PyObject* kwargs, Arguments& arguments) const {
  if (modes_ != Modes::now()) return false;
  const std::span<const Structure> call = structure_.children();
  Leaves leaves;
  if (!call[0].flatten(args, leaves) || !call[1].flatten(kwargs, leaves)) return false;
  for (PyObject* leaf : leaves) arguments.push_back({Object::borrow(leaf), {}});
  for (size_t i = 0; i < leaves_.size(); ++i) {
    if (!accepts(leaves_[i], arguments[i])) return false;
  }
  return same_aliases(leaves);
}

int CallKey::traverse(visitproc visit, void* arg) const {
  for (const Leaf& leaf : leaves_) Py_VISIT(leaf.value.get());
  return structure_.traverse(visit, arg);
}

}  // namespace vt::python
