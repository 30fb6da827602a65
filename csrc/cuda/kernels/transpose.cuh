// Copies between layouts that are transposes of each other (move.cu).
#pragma once

#include "core/tensor_iterator.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// Operand 0 = operand 1 in tiles, between float32 and a 16-bit float where one is a transpose of the
/// other; else false and nothing done.
bool convert_transposed(const Launch& launch, const TensorIterator& it);

}  // namespace vt::cuda
