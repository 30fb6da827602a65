#include "core/host_wait.h"

namespace vt {
namespace {
HostWaitHooks hooks;
}

void set_host_wait_hooks(HostWaitHooks set) { hooks = set; }

HostWait::HostWait() : held_(hooks.begin ? hooks.begin() : nullptr) {}
HostWait::~HostWait() {
  if (held_) hooks.end(held_);
}

}  // namespace vt
