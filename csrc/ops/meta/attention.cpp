// Checks and output shapes of attention, embedding and rotary positions.
#include "autograd/front.h"
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

/// (B, H, T, D) uninitialised, in memory as (B, T, H, D) when `like` is laid out so: then joining
/// the heads again is a view.
Tensor head_layout(const Tensor& like, int64_t width) {
  const auto s = like.sizes();
  if (like.strides()[1] < like.strides()[2]) {
    const int64_t row = s[1] * width;
    return empty_strided(Dims{s[0], s[1], s[2], width}, Dims{s[2] * row, width, row, 1},
                         like.dtype(), like.device());
  }
  return empty(Dims{s[0], s[1], s[2], width}, like.dtype(), like.device());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> _attention(const Tensor& query, const Tensor& key,
                                              const Tensor& value, const Tensor&, double dropout_p,
                                              bool, double, const Generator&) {
  const auto q = query.sizes();
  const DType type = query.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  (void)key;
  return {head_layout(query, value.sizes()[3]), empty(Dims{q[0], q[1], q[2]}, type, query.device()),
          empty(Dims{dropout_p > 0 ? 2 : 0}, DType::Int64, query.device())};
}
std::tuple<Tensor, Tensor, Tensor> _attention_backward(const Tensor&, const Tensor& query,
                                                       const Tensor& key, const Tensor& value,
                                                       const Tensor&, const Tensor&, const Tensor&,
                                                       const Tensor&, double, bool, double) {
  return {head_layout(query, query.sizes()[3]), head_layout(key, key.sizes()[3]),
          head_layout(value, value.sizes()[3])};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> _attention_backward_sums(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& attn_mask, const Tensor& output, const Tensor& lse, const Tensor& rng_state,
    double dropout_p, bool is_causal, double scale, bool sum_query, bool sum_key, bool sum_value,
    std::optional<DType> dtype) {
  const DType type = dtype.value_or(query.dtype());
  check(
      is_floating(type) && !is_float8(type),
      "_attention_backward_sums: expected float16, bfloat16, float32 or float64 for the sums, got ",
      type);
  const auto [grad_query, grad_key, grad_value] =
      _attention_backward(grad_output, query, key, value, attn_mask, output, lse, rng_state,
                          dropout_p, is_causal, scale);
  const auto sums_of = [&](const Tensor& t, bool wanted) {
    return wanted ? empty(Dims{t.sizes()[1] * t.sizes()[3]}, type, t.device()) : Tensor();
  };
  return {grad_query,
          grad_key,
          grad_value,
          sums_of(grad_query, sum_query),
          sums_of(grad_key, sum_key),
          sums_of(grad_value, sum_value)};
}
Tensor _attention_dropout_factors(const Tensor&, const Tensor& query, const Tensor& key, double) {
  const auto q = query.sizes();
  return empty(Dims{q[0], q[1], q[2], key.sizes()[2]}, query.dtype(), query.device());
}

std::tuple<Tensor, Tensor> _attention_varlen(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& cu_seq_q,
                                             const Tensor& cu_seq_k, int64_t, int64_t, double) {
  check(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
        "varlen_attn: query, key and value must be (tokens, heads, width); got shapes ",
        query.sizes(), ", ", key.sizes(), ", ", value.sizes());
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  check(is_floating(query.dtype()) && query.dtype() == key.dtype() && key.dtype() == value.dtype(),
        "varlen_attn: query, key and value must have one floating dtype, got ", query.dtype(), ", ",
        key.dtype(), " and ", value.dtype());
  check(q[2] == k[2] && k[0] == v[0] && k[1] == v[1], "varlen_attn: shapes ", q, ", ", k, ", ", v,
        " do not fit (T_q, H_q, D), (T_k, H_kv, D), (T_k, H_kv, D_v)");
  check(k[1] > 0 && q[1] % k[1] == 0, "varlen_attn: ", q[1],
        " query heads are not a multiple of the ", k[1], " heads of key and value");
  const auto is_index = [](const Tensor& t) {
    return t.dtype() == DType::Int32 || t.dtype() == DType::Int64;
  };
  check(cu_seq_q.dim() == 1 && cu_seq_k.dim() == 1 && cu_seq_q.numel() == cu_seq_k.numel() &&
            cu_seq_q.numel() > 0 && is_index(cu_seq_q) && is_index(cu_seq_k),
        "varlen_attn: cu_seq_q and cu_seq_k must be int32 or int64 of one shape (N + 1,); got ",
        cu_seq_q.dtype(), " of shape ", cu_seq_q.sizes(), " and ", cu_seq_k.dtype(), " of shape ",
        cu_seq_k.sizes());
  const DType type = query.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  return {empty(Dims{q[0], q[1], v[2]}, query.dtype(), query.device()),
          empty(Dims{q[1], q[0]}, type, query.device())};
}
std::tuple<Tensor, Tensor, Tensor> _attention_varlen_backward(
    const Tensor&, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double) {
  return {empty(query.sizes(), query.dtype(), query.device()),
          empty(key.sizes(), key.dtype(), key.device()),
          empty(value.sizes(), value.dtype(), value.device())};
}

Tensor rotary_embedding(const Tensor& self, const Tensor& cos, const Tensor& sin, bool) {
  check(self.dim() >= 2 && self.size(-1) % 2 == 0,
        "rotary_embedding: expected (..., T, D) with even D, got ", self.sizes());
  check(cos.dim() >= 1 && std::ranges::equal(cos.sizes(), sin.sizes()),
        "rotary_embedding: cos and sin differ in shape: ", cos.sizes(), " and ", sin.sizes());
  bool fits = cos.dim() <= self.dim() && cos.size(-1) == self.size(-1) / 2;
  for (int64_t d = 2; fits && d <= cos.dim(); ++d)
    fits = cos.size(-d) == 1 || cos.size(-d) == self.size(-d);
  check(fits, "rotary_embedding: cos and sin of shape ", cos.sizes(),
        " do not broadcast to (..., T, D/2) of ", self.sizes());
  check(!vt::autograd::should_record(cos, sin),
        "rotary_embedding: cos and sin get no gradient, but one of them requires grad; detach() "
        "them, or write the rotation as multiplications");
  if (!is_floating(self.dtype()))
    fail(ErrorKind::NotImplemented, "\"rotary_embedding\" not implemented for '", self.dtype(),
         "'");
  return empty(self.sizes(), self.dtype(), self.device());
}

Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t, bool, bool sparse) {
  check(weight.dim() == 2, "'weight' must be 2-D, got shape ", weight.sizes());
  check(indices.dtype() == DType::Int64 || indices.dtype() == DType::Int32,
        "Expected tensor for argument #1 'indices' to "
        "have one of the following scalar types: Long, Int; but got ",
        indices.dtype(),
        " instead (while checking "
        "arguments for embedding)");
  check(!sparse, "embedding: sparse gradients do not exist here; pass sparse=False");
  Dims sizes(indices.sizes());
  sizes.push_back(weight.sizes()[1]);
  return empty(sizes, weight.dtype(), weight.device());
}
Tensor embedding_dense_backward(const Tensor& grad_output, const Tensor& indices,
                                int64_t num_weights, int64_t, bool) {
  check(grad_output.dim() == indices.dim() + 1, "embedding_dense_backward: grad of shape ",
        grad_output.sizes(), " does not fit indices of shape ", indices.sizes());
  return empty(Dims{num_weights, grad_output.size(-1)}, grad_output.dtype(), grad_output.device());
}

}  // namespace vt::meta
