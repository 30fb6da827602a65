// vibetensor._C.nvtx: ranges and marks for profilers (core/nvtx.h).
#include "core/nvtx.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "dispatch/layers.h"

namespace nb = nanobind;

namespace vt::python {

void bind_nvtx(nb::module_& m) {
  nb::module_ module = m.def_submodule("nvtx", "Ranges and marks for profilers.");
  module.def("open", &nvtx::open, "Opens the library at a path; False if it cannot be.");
  module.def("is_open", &nvtx::is_open);
  module.def("push", &nvtx::push);
  module.def("pop", &nvtx::pop);
  module.def("start", &nvtx::start);
  module.def("end", &nvtx::end);
  module.def("mark", &nvtx::mark);
  module.def("mark_ops", &mark_ops, "Whether every op is a range; returns whether it was.");
}

}  // namespace vt::python
