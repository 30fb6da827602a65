// A convolution without its bias, and its gradients: one op where the backend has a kernel for the
// shapes, products over windows elsewhere. For batched operands of two or three spatial dimensions
// that have been checked.
#pragma once

#include <array>
#include <tuple>

#include "core/small_vector.h"
#include "core/tensor.h"

namespace vt::composite {

/// One value a spatial dimension each.
struct ConvolutionWindow {
  Dims stride, padding, dilation;
  int64_t groups;
};

/// input (N, C, …), weight (O, C / groups, …): (N, O, …).
Tensor convolution(const Tensor& input, const Tensor& weight, const ConvolutionWindow& window);
/// The gradient with respect to an input of `size`.
Tensor convolution_input_grad(const Tensor& grad, const Tensor& weight, IntSpan size,
                              const ConvolutionWindow& window);
/// The gradient with respect to a weight of `size`.
Tensor convolution_weight_grad(const Tensor& grad, const Tensor& input, IntSpan size,
                               const ConvolutionWindow& window);

/// weight (G, rows, k) applied to columns (N, G·k, L): (N, G·rows, L).
Tensor grouped_product(const Tensor& weight, const Tensor& columns);

}  // namespace vt::composite
