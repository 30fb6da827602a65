// Loads the kernel library for this processor: libvt_cpu_v4.so (AVX-512), _v3 (AVX2) or _base.
#pragma once

#include <string>

namespace vt::cpu {

/// Loads the best kernels once; later calls do nothing. `VT_CPU_ISA=base|v3|v4` overrides the
/// choice (downwards only). Throws if no kernel library can be loaded.
void load_backend();
/// "base", "v3" or "v4".
std::string backend_isa();

}  // namespace vt::cpu
