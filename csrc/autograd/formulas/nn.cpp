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

Tensor cross_entropy_grad(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& self,
                          const Tensor& target, const Tensor& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing, const Tensor& lse,
                          const Tensor& total_weight) {
  Tensor result;
  if (grad_loss.defined()) {
    result = ops::_cross_entropy_index_backward(grad_loss, self, target, weight, reduction,
                                                ignore_index, label_smoothing, lse, total_weight);
  }
  if (!grad_lse.defined()) return result;
  const Tensor zero = wrapped_scalar(Scalar(0.0));
  const Tensor factor = ops::_to_dtype(ops::unsqueeze(grad_lse, 1), self.dtype());
  // Rows that are ignored have no gradient, whatever their logits hold.
  const Tensor term = ops::where(ops::ne(factor, zero),
                                 ops::mul(ops::softmax(self, 1, std::nullopt), factor), zero);
  return result.defined() ? ops::add(result, term, Scalar(1)) : term;
}

}  // namespace vt::autograd
