// Used by the backward formulas of nn ops.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

/// The gradient of embedding_dense_backward: rows of `grad`, without the padding row, each over
/// its index's count if the embedding scales by frequency.
Tensor embedding_grad_grad(const Tensor& grad, const Tensor& indices, int64_t padding_idx,
                           bool scale_grad_by_freq);

}  // namespace vt::autograd
