// Kernels on a built iterator of ops that are not of the kind `pointwise`, so that the op itself
// and a fused one run the same code.
#pragma once

#include "core/tensor_iterator.h"

namespace vt::cpu::VT_ISA {

/// Converts, or copies where both dtypes are one. (output, source)
void convert_rows(const TensorIterator& it);
/// (output, condition, where it holds, where not), all but the condition of one dtype.
void where_rows(const TensorIterator& it);
/// grad * mask * scale. (output, grad, mask)
void dropout_backward_rows(const TensorIterator& it, double scale);

}  // namespace vt::cpu::VT_ISA
