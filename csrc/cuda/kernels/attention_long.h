// Attention over long sequences on Hopper GPUs: as many keys as queries, a multiple of
// 128 and of 64 16-bit floats each, no mask and no dropout; several query heads may share a key
// head. The bits are the same each time.
#pragma once

#include "core/tensor.h"
#include "cuda/kernels/attention_sums.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where the kernel does not apply or cuDNN's is faster. Nothing was written then.
bool long_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                  const Tensor& key, const Tensor& value, bool is_causal, double scale);
/// False where the kernels do not apply or cuDNN's are faster. Nothing was written then.
bool long_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums);

}  // namespace vt::cuda::attention
