// Environment variables that switch something on or off.
#pragma once

namespace vt {

/// Whether the variable is on; `otherwise` where it is unset or empty. 0, off, no and false,
/// however written, are off; anything else is on.
bool env_flag(const char* name, bool otherwise);

}  // namespace vt
