// The gradient of an embedding whose table is small: the alphabet of a character model.
#pragma once

#include "cuda/kernels/indices.cuh"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// table[r] = the sum of the rows of `grad` (n of them, dense, of the table's dtype) whose index is
/// r; 0 for `padding`. False, with nothing done, where sorting the indices is the better way.
bool sum_into_small_table(const Launch& launch, const Tensor& table, const Tensor& grad,
                          const Indices& indices, int64_t n, int64_t padding);

}  // namespace vt::cuda
