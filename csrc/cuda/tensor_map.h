// Descriptions of operands for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>

#include "core/tensor.h"

namespace vt::cuda {

/// Describes a (batch, head, row, 64) operand of 16-bit floats, dense in the last dimension, all
/// other strides and the address multiples of 16 bytes: copied in boxes of `rows` rows as tiles of
/// 128-byte rows with the 128-byte swizzle. False where the driver cannot.
bool describe_rows(CUtensorMap& map, const Tensor& operand, int rows);

}  // namespace vt::cuda
