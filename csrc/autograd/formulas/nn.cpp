#include "autograd/formulas/nn.h"

#include "vt/ops.h"

namespace vt::autograd {

Tensor embedding_grad_grad(const Tensor& grad, const Tensor& indices, int64_t padding_idx,
                           bool scale_grad_by_freq) {
  Tensor rows = ops::embedding(grad, indices, -1, false, false);
  if (padding_idx >= 0) {
    const Tensor padded = ops::eq(indices, wrapped_scalar(Scalar(padding_idx)));
    rows = ops::masked_fill(rows, ops::unsqueeze(padded, -1), wrapped_scalar(Scalar(0.0)));
  }
  if (scale_grad_by_freq) {
    const Tensor ones = ops::ones_like(rows, std::nullopt, std::nullopt, std::nullopt);
    const Tensor counts = ops::embedding_dense_backward(ones, indices, grad.size(0), -1, false);
    rows = ops::div(rows, ops::embedding(counts, indices, -1, false, false));
  }
  return rows;
}

}  // namespace vt::autograd
