// Extents of sliding windows, shared by the shape functions of convolutions and pools.
#pragma once

#include "core/error.h"
#include "core/small_vector.h"

namespace vt::meta {

inline int64_t at(IntSpan values, size_t i) { return values[values.size() == 1 ? 0 : i]; }
/// One value for all of `rank` dimensions, or one each.
inline void check_per_dimension(IntSpan values, size_t rank, const char* name) {
  check(values.size() == 1 || values.size() == rank, "expected ", name,
        " to be a single integer value or a list of ", rank,
        " values to match the convolution dimensions, but got ", name, "=", values);
}

/// Windows along one dimension. With `ceil_mode` a last window may hang over the end, if it
/// starts inside the input or its left padding.
inline int64_t window_count(int64_t extent, int64_t kernel, int64_t stride, int64_t padding,
                            int64_t dilation, bool ceil_mode = false) {
  const int64_t room = extent + 2 * padding - dilation * (kernel - 1) - 1;
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (room < 0) count = room + (ceil_mode ? stride - 1 : 0) < 0 ? 0 : count;
  if (ceil_mode && count > 0 && (count - 1) * stride >= extent + padding) --count;
  return count;
}

}  // namespace vt::meta
