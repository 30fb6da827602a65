// Gradients of attention over tiles of 64 rows of 64 16-bit floats, as many keys as queries, a key
// head for each query head, no mask and no dropout. The bits are the same each time.
#pragma once

#include "core/tensor.h"
#include "cuda/kernels/attention_sums.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where the kernels do not apply or cuDNN's are faster. Nothing was written then.
bool tile_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums);

/// Of every query, rows padded to whole tiles of 64: shift = log2 of its sum of exponentials,
/// centre = Σ grad · output, operands of 64 16-bit floats in pieces of 16 bytes.
void query_numbers(const Launch& launch, float* shift, float* centre, const Tensor& grad,
                   const Tensor& output, const Tensor& lse);

}  // namespace vt::cuda::attention
