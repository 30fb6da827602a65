// Longer backward formulas of pointwise ops.
#pragma once

#include <string_view>

#include "core/tensor.h"

namespace vt::autograd {

/// A 0-d zero of `like`'s dtype and device.
Tensor wrapped_zero_like(const Tensor& like);
/// `grad` on `device`: the way back of a copy between devices.
Tensor moved_to(const Tensor& grad, Device device);
/// maximum/minimum: all of the gradient where this side won, half where both are equal.
Tensor extremum_backward(const Tensor& grad, const Tensor& won, const Tensor& tied);
/// Of the logistic loss; slopes steeper than 1e12 are cut, as torch does.
Tensor binary_cross_entropy_grad(const Tensor& grad, const Tensor& self, const Tensor& target);
Tensor pow_backward_self(const Tensor& grad, const Tensor& self, const Tensor& exponent);
Tensor pow_backward_exponent(const Tensor& grad, const Tensor& self, const Tensor& exponent,
                             const Tensor& result);
Tensor gelu_second_derivative(const Tensor& self, std::string_view approximate);
Tensor silu_second_derivative(const Tensor& self);
Tensor softplus_derivative(const Tensor& self, const Scalar& beta, const Scalar& threshold);
Tensor elu_backward(const Tensor& grad, const Tensor& self, const Scalar& alpha,
                    const Scalar& scale, const Scalar& input_scale);
Tensor mish_backward(const Tensor& grad, const Tensor& self);
Tensor hardtanh_backward(const Tensor& grad, const Tensor& self, const Scalar& min_val,
                         const Scalar& max_val);

}  // namespace vt::autograd
