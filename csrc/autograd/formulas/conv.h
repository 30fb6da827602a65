// Used by the backward formulas of convolutions and pooling.
#pragma once

#include <array>
#include <tuple>

#include "core/small_vector.h"
#include "core/tensor.h"

namespace vt::autograd {

/// The elements of the planes of `grad` that `indices` of a max pool point at.
Tensor max_pool2d_gather(const Tensor& grad, const Tensor& indices);

/// Gradients of the three products of a convolution, each of which is linear in both arguments.
std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
                                                const Tensor& weight, IntSpan stride,
                                                IntSpan padding, IntSpan dilation, int64_t groups,
                                                const std::array<bool, 2>& mask);
std::tuple<Tensor, Tensor> convolution_input_grad_backward(
    const Tensor& grad, const Tensor& grad_output, const Tensor& weight, IntSpan stride,
    IntSpan padding, IntSpan dilation, int64_t groups, const std::array<bool, 2>& mask);
std::tuple<Tensor, Tensor> convolution_weight_grad_backward(
    const Tensor& grad, const Tensor& grad_output, const Tensor& input, IntSpan stride,
    IntSpan padding, IntSpan dilation, int64_t groups, const std::array<bool, 2>& mask);

}  // namespace vt::autograd
