// Attention of float32 on tensor cores as exact as in float32 arithmetic, for heads up to 128 wide
// whose rows are aligned to 16 bytes. The bits are the same each time.
#pragma once

#include "core/generator.h"
#include "core/tensor.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::attention {

/// False where the kernels do not apply. Nothing was written then.
bool float_forward(const Launch& launch, const Tensor& out, const Tensor& lse,
                   const Tensor& rng_state, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& mask, double dropout_p, bool is_causal,
                   double scale, const PhiloxArgs& rng);
/// Likewise.
bool float_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& mask,
                    const Tensor& output, const Tensor& lse, const Tensor& rng_state,
                    double dropout_p, bool is_causal, double scale);

}  // namespace vt::cuda::attention
