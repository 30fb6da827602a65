#include "cuda/kernels/attention_short.h"

#include <algorithm>

#include "core/kernel_switches.h"
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"

namespace vt::cuda::attention {
namespace {

constexpr int64_t kWidth = 64;

bool applies(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  // The largest score is the largest product. And cuDNN's kernels alone may have been asked for.
  if (!(scale > 0) || kernel_switch(KernelSwitch::CudnnSmallAttention)) return false;
  const auto q = query.sizes();
  return query.dtype() == DType::BFloat16 && q[3] == kWidth && value.sizes()[3] == kWidth &&
         std::ranges::equal(q, key.sizes());
}

/// A (B, H, T, D) operand. Strides of dimensions of one element are made regular.
cute::Operand operand(const Tensor& t) {
  cute::Operand o(t.data(), t.dtype());
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 3; d-- > 0;) {
    const int64_t inner = d == 2 ? kWidth : o.strides[d + 1] * sizes[d + 1];
    o.strides[d] = sizes[d] > 1 ? strides[d] : inner;
  }
  return o;
}

cute::Operand rows(const Tensor& lse) {
  cute::Operand o(lse.data(), lse.dtype());
  o.strides = {lse.sizes()[1] * lse.sizes()[2], lse.sizes()[2], 0};
  return o;
}

template <class Arguments>
Arguments arguments(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal,
                    double scale) {
  Arguments a;
  a.b = query.sizes()[0];
  a.h = query.sizes()[1];
  a.t = query.sizes()[2];
  a.width = kWidth;
  a.causal = is_causal;
  a.q = operand(query);
  a.k = operand(key);
  a.v = operand(value);
  a.scale = static_cast<float>(scale);
  return a;
}

bool dense_columns(std::initializer_list<const Tensor*> tensors) {
  return std::ranges::all_of(tensors, [](const Tensor* t) { return t->strides()[3] == 1; });
}

}  // namespace

bool short_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  if (!cute::considered<cute::AttentionShortForward>() || !applies(query, key, value, scale) ||
      !dense_columns({&out, &query, &key, &value}))
    return false;
  auto a = arguments<cute::AttentionShortForward>(query, key, value, is_causal, scale);
  a.o = operand(out);
  a.lse = rows(lse);
  return cute::launch(a, launch);
}

bool short_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                    bool is_causal, double scale) {
  if (!cute::considered<cute::AttentionShortBackward>() || !applies(query, key, value, scale) ||
      !dense_columns({&grad_query, &grad_key, &grad_value, &grad, &query, &key, &value, &output}))
    return false;
  auto a = arguments<cute::AttentionShortBackward>(query, key, value, is_causal, scale);
  a.grad = operand(grad);
  a.o = operand(output);
  a.lse = rows(lse);
  a.grad_q = operand(grad_query);
  a.grad_k = operand(grad_key);
  a.grad_v = operand(grad_value);
  return cute::launch(a, launch);
}

}  // namespace vt::cuda::attention
