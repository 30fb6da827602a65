#include "cpu/backend.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

#include "core/error.h"
#include "core/library_folder.h"

namespace vt::cpu {
namespace {

std::string loaded_isa;

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

void load() {
  constexpr const char* names[] = {"base", "v3", "v4"};
  int level = best_level();
  if (const char* wanted = std::getenv("VT_CPU_ISA"); wanted && *wanted) {
    int chosen = -1;
    for (int i = 0; i < 3; ++i) {
      if (std::string_view(wanted) == names[i]) chosen = i;
    }
    check_value(chosen >= 0, "VT_CPU_ISA must be base, v3 or v4, got '", wanted, "'");
    level = std::min(level, chosen);
  }
  const std::string folder = library_folder();
  // A build may have left levels out; one that is there and does not load is an error, as the next
  // would only be slower.
  for (; level >= 0; --level) {
    const std::string path = str(folder, "/libvt_cpu_", names[level], ".so");
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      loaded_isa = names[level];
      return;
    }
    const std::string reason = dlerror();
    check(level > 0 && says_missing(reason, path), "the CPU kernels could not be loaded: ", reason);
  }
}

}  // namespace

void load_backend() {
  static std::once_flag once;
  std::call_once(once, load);
}

std::string backend_isa() { return loaded_isa; }

}  // namespace vt::cpu
