// How these libraries were built.
#include "vt/build_info.h"

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace vt::python {

void bind_build_info(nb::module_& m) {
  m.def(
      "_build_info",
      [] {
        nb::dict out;
        out["type"] = VT_BUILD_TYPE;
        out["compiler"] = VT_BUILD_COMPILER;
        out["flags"] = VT_BUILD_FLAGS;
        out["cpu_levels"] = VT_BUILD_CPU_LEVELS;
        out["cmake"] = VT_BUILD_CMAKE;
        return out;
      },
      "Build type, compiler, flags of C++, levels of the CPU kernels separated by commas, CMake.");
}

}  // namespace vt::python
