// Shape arithmetic behind view and reshape.
#pragma once

#include <optional>

#include "core/tensor.h"

namespace vt {

/// Replaces a -1 in `size` by what makes the product `numel`. Throws torch's "shape '[…]' is
/// invalid".
Dims infer_shape(IntSpan size, int64_t numel);
/// Strides that show `sizes`/`strides` as `shape` without moving anything, if there are any.
std::optional<Dims> view_strides(IntSpan sizes, IntSpan strides, IntSpan shape);
/// `src` seen with the sizes of the tensor it is copied to; missing and unit dimensions repeat.
Tensor broadcast_to(const Tensor& src, IntSpan sizes);
Dims inverse_permutation(IntSpan dims);

}  // namespace vt
