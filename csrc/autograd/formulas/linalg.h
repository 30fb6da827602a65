// Used by the backward formulas of matrix products.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

/// grad · factor, or grad itself when the factor is 1.
Tensor scaled(const Tensor& grad, const Scalar& factor);
Tensor linear_grad_input(const Tensor& grad, const Tensor& weight, IntSpan input_sizes);
Tensor linear_grad_weight(const Tensor& grad, const Tensor& input);
Tensor linear_grad_bias(const Tensor& grad);

}  // namespace vt::autograd
