// Where the runtime's libraries lie: backends and kernels are loaded from the folder of
// libvt_core.so.
#pragma once

#include <string>

namespace vt {

std::string library_folder();

}  // namespace vt
