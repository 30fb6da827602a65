// What uniform_ refuses, on every device.
#pragma once

#include <limits>

#include "core/dtype.h"
#include "core/error.h"

namespace vt {

/// Raises where [from, to) is no range of finite numbers of `dtype`, or wider than its largest one.
inline void check_uniform_bounds(DType dtype, double from, double to) {
  check(from <= to, "uniform_ expects to return a [from, to) range, but found from=", from,
        " > to=", to);
  const double most = dtype == DType::Float64   ? std::numeric_limits<double>::max()
                      : dtype == DType::Float32 ? double{std::numeric_limits<float>::max()}
                      : dtype == DType::Float16 ? 65504.0
                                                : 0x1.fep127;
  check(from >= -most && from <= most, "from is out of bounds for ", dtype, ": ", from);
  check(to >= -most && to <= most, "to is out of bounds for ", dtype, ": ", to);
  check(to - from <= most, "uniform_ expects to - from <= ", most, " for ", dtype,
        ", but found from=", from, " and to=", to);
}

}  // namespace vt
