// Gradients of attention: each block of probabilities is computed again from the log-sum-exp that
// the forward pass saved. (Batch, key head) pairs are spread over the pool.
#include "cpu/kernels/attention_sequences.h"
#include "dispatch/head_sums.h"

namespace vt::cpu::VT_ISA {
namespace {

using namespace attention;

/// What the backward pass reads of a key head: its right operands, and where its gradients go.
template <class T>
struct KeyHead {
  RightOperand<T> keys_t, keys, values_t;
  T *dk, *dv;
  int64_t dk_ld, dv_ld;

  KeyHead(const Problem& p, const Head<T>& k, const Head<T>& v)
      : keys_t(Scratch::KeyPanels, k.data, 1, k.ld, p.width, p.keys),
        keys(Scratch::KeyRows, k.data, k.ld, 1, p.keys, p.width),
        values_t(Scratch::ValuePanels, v.data, 1, v.ld, p.value_width, p.keys),
        dk_ld(RightOperand<T>::row_length(p.width)),
        dv_ld(RightOperand<T>::row_length(p.value_width)) {
    dk = scratch<T>(Scratch::GemmA, p.keys * dk_ld);
    dv = scratch<T>(Scratch::GemmB, p.keys * dv_ld);
    std::fill(dk, dk + p.keys * dk_ld, T(0));
    std::fill(dv, dv + p.keys * dv_ld, T(0));
  }
};

/// Gradients of one query head. dk and dv are added to: a key head serves several query heads.
template <class T>
void backward_head(const Problem& p, const Tensor& grad_query, const Tensor& grad,
                   const Tensor& output, const T* lses, const Tensor& query, const KeyHead<T>& kv,
                   int64_t b, int64_t h) {
  using Right = RightOperand<T>;
  const Head<T> q(query, b, h, Scratch::Query), g(grad, b, h, Scratch::Output),
      o(output, b, h, Scratch::Extra);
  T* prob = scratch<T>(Scratch::Scores, kQueryBlock * kKeyBlock);
  T* dprob = scratch<T>(Scratch::Gradients, kQueryBlock * kKeyBlock);
  const int64_t dq_ld = Right::row_length(p.width);
  T* dq = scratch<T>(Scratch::Row0, kQueryBlock * dq_ld);
  T* keep = p.dropout > 0 ? scratch<T>(Scratch::Row1, kKeyBlock) : nullptr;
  const T scale = static_cast<T>(p.scale);
  T along[kQueryBlock];
  for (int64_t q0 = 0; q0 < p.queries; q0 += kQueryBlock) {
    const int64_t qn = std::min(kQueryBlock, p.queries - q0);
    const T *q_rows = q.data + q0 * q.ld, *g_rows = g.data + q0 * g.ld;
    const Right queries(Scratch::QueryPanels, q_rows, q.ld, 1, qn, p.width);
    const Right grads(Scratch::GradPanels, g_rows, g.ld, 1, qn, p.value_width);
    for (int64_t i = 0; i < qn; ++i)
      along[i] = row_dot(g_rows + i * g.ld, o.data + (q0 + i) * o.ld, p.value_width);
    std::fill(dq, dq + qn * dq_ld, T(0));
    const int64_t limit = p.visible(q0 + qn);
    for (int64_t k0 = p.first_block(q0); k0 < limit; k0 += kKeyBlock) {
      const int64_t kn = std::min(kKeyBlock, limit - k0), ld = Right::row_length(kn);
      // Operands without columns give scores and gradients of zero.
      if (p.width == 0) std::fill(prob, prob + qn * ld, T(0));
      if (p.value_width == 0) std::fill(dprob, dprob + qn * ld, T(0));
      by_rows<T>(p, q0, qn, k0, kn, [&](int64_t i, int64_t rows, int64_t seen) {
        if (p.width > 0) {
          kv.keys_t.multiply({rows, seen, p.width}, scale, q_rows + i * q.ld, q.ld, 1, 0, k0, T(0),
                             prob + i * ld, ld);
        }
        if (p.value_width > 0) {
          kv.values_t.multiply({rows, seen, p.value_width}, T(1), g_rows + i * g.ld, g.ld, 1, 0, k0,
                               T(0), dprob + i * ld, ld);
        }
      });
      mask_scores(p, prob, ld, b, h, q0, qn, k0, kn);
      for (int64_t i = 0; i < qn; ++i) {
        const Row<T> row(p, prob, ld, q0 + i, i, k0, kn);
        T *line = row.line, *dline = dprob + i * ld;
        const T shift = lses[q0 + i];
        if (shift == -std::numeric_limits<T>::infinity()) {
          row.clear(line);
          row.clear(dline);
          continue;
        }
        if (keep) {
          dropout_row(p, keep, b, h, q0 + i, k0, row.seen);
          for (int64_t j = 0; j < row.seen; ++j) {
            const T value = exp_nonpositive(line[j] - shift);
            dline[j] = value * (dline[j] * keep[j] - along[i]) * scale;
            line[j] = value * keep[j];
          }
        } else {
          for (int64_t j = 0; j < row.computed; ++j) {
            line[j] = exp_nonpositive(line[j] - shift);
            dline[j] = line[j] * (dline[j] - along[i]) * scale;
          }
        }
        row.clear_unseen(line);
        row.clear_unseen(dline);
      }
      by_keys<T>(p, q0, qn, k0, kn, [&](int64_t j, int64_t keys, int64_t first) {
        const int64_t at = first * ld + j, n = qn - first;
        if (p.value_width > 0)
          grads.multiply({keys, p.value_width, n}, T(1), prob + at, 1, ld, first, 0, T(1),
                         kv.dv + (k0 + j) * kv.dv_ld, kv.dv_ld);
        if (p.width > 0)
          queries.multiply({keys, p.width, n}, T(1), dprob + at, 1, ld, first, 0, T(1),
                           kv.dk + (k0 + j) * kv.dk_ld, kv.dk_ld);
      });
      by_rows<T>(p, q0, qn, k0, kn, [&](int64_t i, int64_t rows, int64_t seen) {
        if (p.width > 0)
          kv.keys.multiply({rows, p.width, seen}, T(1), dprob + i * ld, ld, 1, k0, 0, T(1),
                           dq + i * dq_ld, dq_ld);
      });
    }
    store_rows(grad_query, b, h, q0, qn, dq, dq_ld);
  }
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
              const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& mask, const Tensor& output, const Tensor& lse, const Tensor& rng_state,
              double dropout_p, bool is_causal, double scale) {
  PhiloxArgs rng{};
  if (rng_state.numel() > 0) {
    const int64_t* state = rng_state.data_as<int64_t>();
    rng = {static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1])};
  }
  const Problem p(query, key, value, mask, dropout_p, is_causal, scale, rng);
  const int64_t per_key_head = p.heads / std::max<int64_t>(p.key_heads, 1);
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t b = pair / p.key_heads, kv = pair % p.key_heads;
        const Head<T> k(key, b, kv, Scratch::Key), v(value, b, kv, Scratch::Value);
        const KeyHead<T> head(p, k, v);
        for (int64_t h = kv * per_key_head; h < (kv + 1) * per_key_head; ++h)
          backward_head(p, grad_query, grad, output,
                        lse.data_as<T>() + (b * p.heads + h) * p.queries, query, head, b, h);
        store_rows(grad_key, b, kv, 0, p.keys, head.dk, head.dk_ld);
        store_rows(grad_value, b, kv, 0, p.keys, head.dv, head.dv_ld);
      }
    });
  });
}

void backward_sums(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                   const Tensor& query_sums, const Tensor& key_sums, const Tensor& value_sums,
                   const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& mask, const Tensor& output, const Tensor& lse,
                   const Tensor& rng_state, double dropout_p, bool is_causal, double scale, bool,
                   bool, bool, std::optional<DType> dtype) {
  backward(grad_query, grad_key, grad_value, grad, query, key, value, mask, output, lse, rng_state,
           dropout_p, is_causal, scale);
  const HeadSums sums[] = {
      {grad_query, query_sums}, {grad_key, key_sums}, {grad_value, value_sums}};
  sum_head_rows(kernels_for(DeviceType::CPU), sums, dtype);
}

void backward_varlen(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                     const Tensor& grad, const Tensor& query, const Tensor& key,
                     const Tensor& value, const Tensor& cu_seq_q, const Tensor& cu_seq_k,
                     const Tensor& output, const Tensor& lse, int64_t left, int64_t right,
                     double scale) {
  const Sequences sequences(query, key, value, cu_seq_q, cu_seq_k, left, right, scale);
  sequences.clear_uncovered(sequences.query_starts, grad_query, 0, 0.0);
  sequences.clear_uncovered(sequences.key_starts, grad_key, 0, 0.0);
  sequences.clear_uncovered(sequences.key_starts, grad_value, 0, 0.0);
  const int64_t key_heads = key.sizes()[1], per_key_head = query.sizes()[1] / key_heads;
  const int64_t pairs = static_cast<int64_t>(sequences.problems.size()) * key_heads;
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const size_t index = static_cast<size_t>(pair / key_heads);
        const int64_t kv = pair % key_heads;
        const Problem& p = sequences.problems[index];
        const Tensor k_rows = sequences.keys_of(key, index),
                     v_rows = sequences.keys_of(value, index),
                     q_rows = sequences.queries_of(query, index),
                     g_rows = sequences.queries_of(grad, index),
                     o_rows = sequences.queries_of(output, index),
                     dq_rows = sequences.queries_of(grad_query, index);
        const Head<T> k(k_rows, 0, kv, Scratch::Key), v(v_rows, 0, kv, Scratch::Value);
        const KeyHead<T> head(p, k, v);
        for (int64_t h = kv * per_key_head; h < (kv + 1) * per_key_head; ++h) {
          const T* lses = lse.data_as<T>() + h * query.sizes()[0] + sequences.query_starts[index];
          backward_head(p, dq_rows, g_rows, o_rows, lses, q_rows, head, 0, h);
        }
        store_rows(sequences.keys_of(grad_key, index), 0, kv, 0, p.keys, head.dk, head.dk_ld);
        store_rows(sequences.keys_of(grad_value, index), 0, kv, 0, p.keys, head.dv, head.dv_ld);
      }
    });
  });
}

const RegisterCpu register_attention_backward([](KernelTable& t) {
  t._attention_backward = backward;
  t._attention_backward_sums = backward_sums;
  t._attention_varlen_backward = backward_varlen;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
