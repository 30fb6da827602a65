// Attention of 16-bit floats by cuDNN's fused kernels, where they apply: no mask, no dropout, heads
// in 16-byte pieces. Its saved statistics are ours (the natural logarithm of the sum of
// exponentials of the scaled scores), so either side's forward goes with either side's backward.
#pragma once

#include "core/tensor.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where the library does not apply, is switched off or is missing. Nothing was written then.
bool cudnn_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, bool is_causal, double scale);
/// Likewise. `lse` is float32; `grad` and `output` have the query's dtype.
bool cudnn_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                    bool is_causal, double scale);

}  // namespace vt::cuda::attention
