// The binding of a program, for those that run it without Python.
#pragma once

#include "graphs/program.h"

namespace vt::python {

struct PyProgram {
  Ref<graphs::Program> program = make_ref<graphs::Program>();
};

}  // namespace vt::python
