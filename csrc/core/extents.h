// A shape as seen from one of its dimensions.
#pragma once

#include "core/tensor.h"

namespace vt {

/// How many elements come before, in and after a dimension, of a dense tensor.
struct Extents {
  int64_t outer = 1, length = 1, inner = 1;
};
inline Extents extents_of(IntSpan sizes, int64_t dim) {
  Extents e;
  if (sizes.empty()) return e;
  const int64_t d = wrap_dim(dim, static_cast<int64_t>(sizes.size()));
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i)
    (i < d ? e.outer : i == d ? e.length : e.inner) *= sizes[i];
  return e;
}

}  // namespace vt
