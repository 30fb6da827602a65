// The largest finite number of a float dtype.
#pragma once

#include <limits>

#include "core/dtype.h"

namespace vt {

constexpr double largest_finite(DType dtype) {
  switch (dtype) {
    case DType::Float16:
      return 65504.0;
    case DType::BFloat16:
      return 0x1.fep127;
    case DType::Float32:
      return std::numeric_limits<float>::max();
    case DType::Float8_e4m3fn:
      return 448.0;
    case DType::Float8_e5m2:
      return 57344.0;
    default:
      return std::numeric_limits<double>::max();
  }
}

}  // namespace vt
