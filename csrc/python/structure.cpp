#include "python/structure.h"

#include <algorithm>

namespace vt::python {
namespace {

PyObject* type_object(PyTypeObject& type) { return reinterpret_cast<PyObject*>(&type); }

/// Of a str and any object; runs no Python code.
bool same_key(PyObject* a, PyObject* b) {
  return a == b || (PyUnicode_CheckExact(b) && PyObject_RichCompareBool(a, b, Py_EQ) == 1);
}

}  // namespace

std::optional<Structure> Structure::parse(PyObject* spec) {
  Structure out;
  if (!PyTuple_Check(spec)) return out;
  PyObject* kind = PyTuple_GetItem(spec, 0);
  PyObject* items = PyTuple_GetItem(spec, 1);
  const bool is_dict = PyTuple_Check(kind);
  if (is_dict) {
    if (PyTuple_GetItem(kind, 0) != type_object(PyDict_Type)) return std::nullopt;
    out.kind_ = Kind::Dict;
  } else {
    out.kind_ = kind == type_object(PyList_Type) ? Kind::List : Kind::Tuple;
    out.type_ = Object::borrow(kind);
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(items); ++i) {
    PyObject* child = PyTuple_GetItem(items, i);
    if (is_dict) {
      PyObject* key = PyTuple_GetItem(child, 0);
      if (!PyUnicode_CheckExact(key)) return std::nullopt;
      out.keys_.push_back(Object::borrow(key));
      child = PyTuple_GetItem(child, 1);
    }
    std::optional<Structure> parsed = parse(child);
    if (!parsed) return std::nullopt;
    out.children_.push_back(std::move(*parsed));
  }
  return out;
}

bool Structure::flatten(PyObject* value, Leaves& leaves) const {
  const auto n = static_cast<Py_ssize_t>(children_.size());
  switch (kind_) {
    case Kind::Leaf:
      leaves.push_back(value);
      return true;
    case Kind::Tuple:
      if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != type_.get() || PyTuple_Size(value) != n)
        return false;
      for (Py_ssize_t i = 0; i < n; ++i) {
        if (!children_[static_cast<size_t>(i)].flatten(PyTuple_GetItem(value, i), leaves))
          return false;
      }
      return true;
    case Kind::List:
      if (!PyList_CheckExact(value) || PyList_Size(value) != n) return false;
      for (Py_ssize_t i = 0; i < n; ++i) {
        if (!children_[static_cast<size_t>(i)].flatten(PyList_GetItem(value, i), leaves))
          return false;
      }
      return true;
    case Kind::Dict: {
      if (!PyDict_CheckExact(value) || PyDict_Size(value) != n) return false;
      PyObject *key = nullptr, *item = nullptr;
      size_t i = 0;
      for (Py_ssize_t place = 0; PyDict_Next(value, &place, &key, &item); ++i) {
        if (!same_key(keys_[i].get(), key) || !children_[i].flatten(item, leaves)) return false;
      }
      return true;
    }
  }
  return false;
}

bool Structure::plain() const {
  return (kind_ != Kind::Tuple || type_.get() == type_object(PyTuple_Type)) &&
         std::all_of(children_.begin(), children_.end(),
                     [](const Structure& child) { return child.plain(); });
}

Object Structure::build(std::span<Object>& leaves) const {
  if (kind_ == Kind::Leaf) {
    Object leaf = std::move(leaves.front());
    leaves = leaves.subspan(1);
    return leaf;
  }
  const auto n = static_cast<Py_ssize_t>(children_.size());
  Object out = own(kind_ == Kind::Tuple  ? PyTuple_New(n)
                   : kind_ == Kind::List ? PyList_New(n)
                                         : PyDict_New());
  for (Py_ssize_t i = 0; i < n; ++i) {
    Object child = children_[static_cast<size_t>(i)].build(leaves);
    int failed = 0;
    if (kind_ == Kind::Tuple) {
      failed = PyTuple_SetItem(out.get(), i, child.release());
    } else if (kind_ == Kind::List) {
      failed = PyList_SetItem(out.get(), i, child.release());
    } else {
      failed = PyDict_SetItem(out.get(), keys_[static_cast<size_t>(i)].get(), child.get());
    }
    if (failed) throw PythonError();
  }
  return out;
}

int Structure::traverse(visitproc visit, void* arg) const {
  Py_VISIT(type_.get());
  for (const Object& key : keys_) Py_VISIT(key.get());
  for (const Structure& child : children_) {
    if (const int stop = child.traverse(visit, arg)) return stop;
  }
  return 0;
}

}  // namespace vt::python
