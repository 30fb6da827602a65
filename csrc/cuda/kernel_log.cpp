#include "cuda/kernel_log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string_view>

namespace vt::cuda {

const bool detail::kernel_log = [] {
  const char* text = std::getenv("VT_KERNEL_LOG");
  return text && *text && std::string_view(text) != "0";
}();

void log_kernel(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string>* const told = new std::set<std::string>;
  const std::lock_guard lock(mutex);
  if (told->insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace vt::cuda
