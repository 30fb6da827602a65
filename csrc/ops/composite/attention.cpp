// scaled_dot_product_attention over the blocked kernel, and its gradient in plain ops.
#include "autograd/front.h"
#include "core/tensor_iterator.h"
#include "ops/composite/arithmetic.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

/// Key or value heads repeated for the query heads that share them.
Tensor shared_heads(const Tensor& t, int64_t heads) {
  const auto s = t.sizes();
  if (s[1] == heads) return t;
  const Tensor wide =
      ops::expand(ops::unsqueeze(t, 2), Dims{s[0], s[1], heads / s[1], s[2], s[3]}, false);
  return ops::reshape(wide, Dims{s[0], heads, s[2], s[3]});
}

/// softmax(q kᵀ scale + mask), whole.
Tensor probabilities(const Tensor& q, const Tensor& k, const Tensor& mask, bool is_causal,
                     double scale) {
  Tensor scores = ops::matmul(q * scale, ops::transpose(k, -2, -1));
  const Tensor never = wrapped_scalar(Scalar(-std::numeric_limits<double>::infinity()));
  if (is_causal) {
    const Tensor seen =
        ops::tril(ops::ones(Dims{q.size(-2), k.size(-2)}, DType::Bool, q.device()), 0);
    scores = ops::where(seen, scores, never);
  }
  if (!mask.defined()) return ops::softmax(scores, -1, std::nullopt);
  scores = mask.dtype() == DType::Bool ? ops::where(mask, scores, never) : scores + mask;
  // A query that may look at no key attends to nothing: zeros, and no gradient.
  const Tensor nothing = wrapped_scalar(Scalar(0.0));
  const Tensor blind = ops::all_dim(ops::eq(scores, never), Dims{-1}, true);
  return ops::where(blind, nothing,
                    ops::softmax(ops::where(blind, nothing, scores), -1, std::nullopt));
}

}  // namespace

Tensor scaled_dot_product_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const Tensor& attn_mask, double dropout_p, bool is_causal,
                                    std::optional<double> scale, bool enable_gqa) {
  const int64_t n = query.dim();
  const int64_t rank = std::max({n, key.dim(), value.dim()});
  if (n >= 2 && key.dim() >= 2 && value.dim() >= 2 &&
      (n != rank || key.dim() != rank || value.dim() != rank)) {
    // Missing leading dimensions broadcast.
    const auto lift = [rank](Tensor t) {
      while (t.dim() < rank) t = ops::unsqueeze(t, 0);
      return t;
    };
    return ops::scaled_dot_product_attention(lift(query), lift(key), lift(value), attn_mask,
                                             dropout_p, is_causal, scale, enable_gqa);
  }
  check(n >= 2 && key.dim() == n && value.dim() == n,
        "scaled_dot_product_attention: query, key and value must have the same "
        "number of dimensions, at least 2; got shapes ",
        query.sizes(), ", ", key.sizes(), ", ", value.sizes());
  check(query.dtype() == key.dtype() && key.dtype() == value.dtype(),
        "Expected query, key, and value to have the same dtype, "
        "but got query.dtype: ",
        query.dtype(), " key.dtype: ", key.dtype(), " and value.dtype: ", value.dtype(),
        " instead.");
  check(is_floating(query.dtype()), "scaled_dot_product_attention: expected floating tensors, got ",
        query.dtype());
  check(!(is_causal && attn_mask.defined()),
        "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True");
  check(dropout_p >= 0 && dropout_p <= 1, "dropout probability has to be between 0 and 1, but got ",
        dropout_p);
  check(query.size(-1) == key.size(-1) && key.size(-2) == value.size(-2),
        "scaled_dot_product_attention: shapes ", query.sizes(), ", ", key.sizes(), ", ",
        value.sizes(), " do not fit (…, L, E), (…, S, E), (…, S, Ev)");
  if (attn_mask.defined()) {
    check(attn_mask.dtype() == DType::Bool || is_floating(attn_mask.dtype()),
          "Expected attn_mask dtype to be bool or float or "
          "to match query dtype, but got attn_mask.dtype: ",
          attn_mask.dtype(), " and  query.dtype: ", query.dtype(), " instead.");
  }
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(query.size(-1))));

  // Leading dimensions broadcast; heads are the last of them.
  const size_t lead = static_cast<size_t>(n - 2);
  Dims batch = broadcast_shapes(key.sizes().first(lead), value.sizes().first(lead));
  int64_t key_heads = 1;
  if (enable_gqa && lead > 0) {
    key_heads = batch[lead - 1];
    const int64_t heads = query.sizes()[lead - 1];
    check(key_heads > 0 && heads % key_heads == 0,
          "Number of heads in key and value must divide the number of heads in query, "
          "but got ",
          heads, " query heads and ", key_heads, " key heads");
    batch[lead - 1] = heads;
  }
  batch = broadcast_shapes(batch, query.sizes().first(lead));
  const int64_t heads = lead > 0 ? batch[lead - 1] : 1;
  if (!enable_gqa || lead == 0) key_heads = heads;
  int64_t outer = 1;
  for (size_t d = 0; d + 1 < lead; ++d) outer *= batch[d];
  const auto four_dims = [&](const Tensor& t, int64_t head_count) {
    const auto s = t.sizes();
    Dims wide(batch);
    if (lead > 0) wide[lead - 1] = head_count;
    wide.push_back(s[lead]);
    wide.push_back(s[lead + 1]);
    Tensor full = std::ranges::equal(s, IntSpan(wide)) ? t : ops::expand(t, wide, false);
    return n == 4 ? full : ops::reshape(full, Dims{outer, head_count, s[lead], s[lead + 1]});
  };
  const Tensor q = four_dims(query, heads), k = four_dims(key, key_heads),
               v = four_dims(value, key_heads);
  Tensor mask = attn_mask;
  if (mask.defined()) {
    Dims full(batch);
    full.push_back(query.sizes()[lead]);
    full.push_back(key.sizes()[lead]);
    if (mask.dim() > 4 || n > 4) {
      mask = ops::reshape(ops::expand(mask, full, false),
                          Dims{outer, heads, full[lead], full[lead + 1]});
    } else {
      broadcast_shapes(mask.sizes(), full);
      if (n == 3 && mask.dim() == 3)
        mask = ops::unsqueeze(mask, 0);  // (H, L, S): its first dimension is the heads
    }
  }
  Tensor out;
  if (mask.defined() && thread_state.grad_enabled && autograd::any_requires_grad(mask)) {
    Tensor weights = probabilities(q, shared_heads(k, heads), mask, false, factor);
    if (dropout_p > 0) weights = ops::dropout(weights, dropout_p, true);
    out = ops::matmul(weights, shared_heads(v, heads));
  } else {
    out = std::get<0>(ops::_attention(q, k, v, mask, dropout_p, is_causal, factor, Generator()));
  }
  if (n == 4) return out;
  Dims shape(batch);
  shape.push_back(query.sizes()[lead]);
  shape.push_back(value.sizes()[lead + 1]);
  return ops::reshape(out, shape);
}

std::tuple<Tensor, Tensor, Tensor> _attention_backward_composite(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& attn_mask, const Tensor&, const Tensor&, const Tensor& rng_state,
    double dropout_p, bool is_causal, double scale) {
  const int64_t heads = query.sizes()[1], key_heads = key.sizes()[1];
  const Tensor k = shared_heads(key, heads), v = shared_heads(value, heads);
  const Tensor p = probabilities(query, k, attn_mask, is_causal, scale);
  Tensor dropped = p, dp = ops::matmul(grad, ops::transpose(v, -2, -1));
  if (dropout_p > 0) {
    const Tensor factors = ops::_attention_dropout_factors(rng_state, query, key, dropout_p);
    dropped = p * factors;
    dp = dp * factors;
  }
  const Tensor ds = p * (dp - sum(dp * p, Dims{-1}, true)) * scale;
  const auto per_key_head = [&](const Tensor& t) {
    if (key_heads == heads) return t;
    const auto s = t.sizes();
    return sum(ops::reshape(t, Dims{s[0], key_heads, heads / key_heads, s[2], s[3]}), Dims{2},
               false);
  };
  return {ops::matmul(ds, k), per_key_head(ops::matmul(ops::transpose(ds, -2, -1), query)),
          per_key_head(ops::matmul(ops::transpose(dropped, -2, -1), grad))};
}

}  // namespace vt::composite
