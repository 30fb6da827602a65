#include "autograd/formulas/linalg.h"

#include "vt/ops.h"

namespace vt::autograd {
namespace {

/// All leading dimensions as one.
Tensor as_matrix(const Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t last = t.sizes()[t.dim() - 1];
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.sizes()[d];
  return ops::reshape(t, Dims{rows, last});
}

}  // namespace

Tensor scaled(const Tensor& grad, const Scalar& factor) {
  if (factor.to_double() == 1) return grad;
  return ops::mul(grad, wrapped_scalar(factor));
}

Tensor linear_grad_input(const Tensor& grad, const Tensor& weight, IntSpan input_sizes) {
  const Tensor out = ops::mm(as_matrix(grad), weight);
  return input_sizes.size() == 2 ? out : ops::view(out, input_sizes);
}

Tensor linear_grad_weight(const Tensor& grad, const Tensor& input) {
  return ops::mm(ops::t(as_matrix(grad)), as_matrix(input));
}

Tensor linear_grad_bias(const Tensor& grad) {
  if (grad.dim() == 1) return grad;
  return ops::sum_dim(as_matrix(grad), IntSpan(Dims{0}), false, std::nullopt);
}

}  // namespace vt::autograd
