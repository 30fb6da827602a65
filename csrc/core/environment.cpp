#include "core/environment.h"

#include <strings.h>

#include <cstdlib>
#include <initializer_list>

namespace vt {

bool env_flag(const char* name, bool otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  for (const char* off : {"0", "off", "no", "false"}) {
    if (strcasecmp(text, off) == 0) return false;
  }
  return true;
}

}  // namespace vt
