#pragma once

namespace vt {

/// Physical cores this process may keep busy: those of its affinity mask (hyper-threads of a core
/// count once), bounded by its cgroup's CPU quota. At least 1.
int available_cores();

}  // namespace vt
