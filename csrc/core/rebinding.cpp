#include "core/rebinding.h"

namespace vt {

std::atomic<uint64_t> rebindings{1};

}  // namespace vt
