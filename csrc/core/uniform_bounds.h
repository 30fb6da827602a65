// What uniform_ refuses, on every device.
#pragma once

#include "core/error.h"
#include "core/largest_finite.h"

namespace vt {

/// Raises where [from, to) is no range of finite numbers of `dtype`, or wider than its largest one.
inline void check_uniform_bounds(DType dtype, double from, double to) {
  check(from <= to, "uniform_ expects to return a [from, to) range, but found from=", from,
        " > to=", to);
  const double most = largest_finite(dtype);
  check(from >= -most && from <= most, "from is out of bounds for ", dtype, ": ", from);
  check(to >= -most && to <= most, "to is out of bounds for ", dtype, ": ", to);
  check(to - from <= most, "uniform_ expects to - from <= ", most, " for ", dtype,
        ", but found from=", from, " and to=", to);
}

}  // namespace vt
