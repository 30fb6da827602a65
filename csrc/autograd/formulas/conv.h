// Used by the backward formulas of pooling.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

/// The elements of the planes of `grad` that `indices` of a max pool point at.
Tensor max_pool2d_gather(const Tensor& grad, const Tensor& indices);

}  // namespace vt::autograd
