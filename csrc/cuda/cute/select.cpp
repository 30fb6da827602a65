#include "cuda/cute/select.h"

namespace vt::cuda::cute {

std::optional<Mode> mode_from(std::string_view text) {
  if (text.empty() || text == "table") return Mode::Table;
  if (text == "off") return Mode::Off;
  if (text == "model") return Mode::Model;
  if (text == "all") return Mode::All;
  return std::nullopt;
}

}  // namespace vt::cuda::cute
