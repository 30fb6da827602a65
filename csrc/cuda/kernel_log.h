// VT_KERNEL_LOG=1: which kernel a call got, where there is a choice, told to stderr once each.
#pragma once

#include <string>

namespace vt::cuda {

namespace detail {
extern const bool kernel_log;  // read from the environment as the library is loaded
}
/// Whether decisions are to be told.
inline bool kernel_log() { return detail::kernel_log; }
/// Prints a line that was not printed before.
void log_kernel(const std::string& line);

}  // namespace vt::cuda
