// Used by the backward formulas of nn ops.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

/// The gradient of embedding_dense_backward: rows of `grad`, without the padding row, each over
/// its index's count if the embedding scales by frequency.
Tensor embedding_grad_grad(const Tensor& grad, const Tensor& indices, int64_t padding_idx,
                           bool scale_grad_by_freq);

/// The gradient of cross entropy's logits. One of the loss alone is one op; grad_lse, a number a
/// row, adds that of the log-sum-exp (z-loss). Either may be undefined.
Tensor cross_entropy_grad(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& self,
                          const Tensor& target, const Tensor& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing, const Tensor& lse,
                          const Tensor& total_weight);

}  // namespace vt::autograd
