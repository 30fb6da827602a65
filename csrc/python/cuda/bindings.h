// The parts of vibetensor._cuda.
#pragma once

#include <nanobind/nanobind.h>

namespace vt::cuda {

void bind_memory(nanobind::module_& m);
void bind_memory_history(nanobind::module_& m);
/// Where NVIDIA's libraries are, cuDNN's switches, NVRTC.
void bind_libraries(nanobind::module_& m);
/// Measured algorithms of cuBLASLt, and what measuring them needs.
void bind_products(nanobind::module_& m);
/// CuTe kernels by name.
void bind_cute(nanobind::module_& m);
/// Before the interpreter ends: Python is not called again.
void close_memory();

/// `device`, which is there; throws otherwise.
int checked_device(int device);

}  // namespace vt::cuda
