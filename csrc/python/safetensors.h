#pragma once

#include <nanobind/nanobind.h>

namespace vt::python {

/// Adds the submodule `safetensors` (functions and exception classes) to `parent`.
void bind_safetensors(nanobind::module_& parent);

}  // namespace vt::python
