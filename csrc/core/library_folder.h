// Where the runtime's libraries lie: backends and kernels are loaded from the folder of
// libvt_core.so.
#pragma once

#include <string>
#include <string_view>

namespace vt {

std::string library_folder();

/// Whether `reason`, the loader's for not loading the library at `path`, is that there is no such
/// file, and not that one which it needs is missing.
bool says_missing(std::string_view reason, std::string_view path);

}  // namespace vt
