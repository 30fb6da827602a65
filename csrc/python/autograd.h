// Shared by the autograd bindings.
#pragma once

#include "autograd/node.h"
#include "python/python.h"

namespace vt::python {

extern PyTypeObject* node_type;
/// A new reference to the Python object of a node (None if null); one object while one lives.
PyObject* wrap_node(const Ref<autograd::Node>& node);
/// For Python's garbage collector: the functions that nothing but this tensor's hooks hold.
int visit_hooks(const Tensor& t, visitproc visit, void* arg);
void clear_hooks(const Tensor& t);
void add_autograd(PyObject* module);
void add_function(PyObject* module);  // autograd.Function
void add_dispatch(PyObject* module);  // overrides, modes, recorder, autocast

}  // namespace vt::python
