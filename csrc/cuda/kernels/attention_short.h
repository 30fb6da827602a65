// Attention of short sequences by CuTe kernels, where they were measured to be faster: up to 256
// rows of 64 bfloat16 values, as many keys as queries, a key head for each query head, no mask and
// no dropout. The bits are the same each time.
#pragma once

#include "core/tensor.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where no kernel applies or none is chosen. Nothing was written then.
bool short_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, bool is_causal, double scale);
/// Likewise.
bool short_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                    bool is_causal, double scale);

}  // namespace vt::cuda::attention
