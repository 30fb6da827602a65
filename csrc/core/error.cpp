#include "core/error.h"

#include <cstdio>

namespace vt {

void append(std::string& out, std::span<const int64_t> values) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(values[i]);
  }
  out += ']';
}

void append(std::string& out, double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%g", value);
  out += text;
}

}  // namespace vt
