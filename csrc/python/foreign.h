// Python callables as the op _foreign takes them.
#pragma once

#include "core/foreign.h"
#include "python/python.h"

namespace vt::python {

/// The callable behind the function; a new reference.
PyObject* foreign_callable(const ForeignFunction& function);
/// From now on the function does not keep its callable alive: somebody whom Python's garbage
/// collector knows does, as callables may refer back to what was captured.
void loosen_foreign(const ForeignFunction& function);

}  // namespace vt::python
