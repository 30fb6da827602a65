// Attention of short sequences, a block for each head: up to 128 rows of 64 or 32 16-bit floats, as
// many keys as queries, a key head for each query head, no mask and no dropout. The bits are the
// same each time.
#pragma once

#include "core/tensor.h"
#include "cuda/kernels/attention_sums.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where the kernels do not apply. Nothing was written then.
bool head_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                  const Tensor& key, const Tensor& value, bool is_causal, double scale);
/// Likewise.
bool head_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums);

}  // namespace vt::cuda::attention
