#include "core/library_folder.h"

#include <dlfcn.h>

#include "core/error.h"

namespace vt {

std::string library_folder() {
  Dl_info info{};
  check(dladdr(reinterpret_cast<void*>(&library_folder), &info) != 0 && info.dli_fname,
        "cannot locate libvt_core.so");
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

bool says_missing(std::string_view reason, std::string_view path) {
  return reason.starts_with(str(path, ": cannot open shared object file: No such file"));
}

}  // namespace vt
