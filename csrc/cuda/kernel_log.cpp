#include "cuda/kernel_log.h"

#include <cstdio>
#include <mutex>
#include <set>

#include "core/environment.h"

namespace vt::cuda {

const bool detail::kernel_log = env_flag("VT_KERNEL_LOG", false);

void log_kernel(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string>* const told = new std::set<std::string>;
  const std::lock_guard lock(mutex);
  if (told->insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace vt::cuda
