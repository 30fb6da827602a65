// Scaled dot-product attention in blocks: no T×T matrix is kept. Forward runs an online softmax
// over blocks of keys and saves one log-sum-exp a query. Source: Dao et al., "FlashAttention",
// NeurIPS 2022, and its second part. Blocks are products on one thread, a few rows at a time, so
// that causal attention computes little beyond its diagonal; (batch, head) pairs and blocks of
// queries are spread over the pool.
#include "cpu/kernels/attention_sequences.h"

namespace vt::cpu::VT_ISA {
namespace {

using namespace attention;

template <class T>
void forward_block(const Problem& p, const Tensor& out, T* lses, const Head<T>& q,
                   const RightOperand<T>& keys_t, const RightOperand<T>& values, int64_t b,
                   int64_t h, int64_t q0, int64_t qn) {
  using Right = RightOperand<T>;
  T* scores = scratch<T>(Scratch::Scores, kQueryBlock * kKeyBlock);
  const int64_t acc_ld = Right::row_length(p.value_width);
  T* acc = scratch<T>(Scratch::Output, kQueryBlock * acc_ld);
  T top[kQueryBlock], total[kQueryBlock];
  std::fill(top, top + qn, -std::numeric_limits<T>::infinity());
  std::fill(total, total + qn, T(0));
  std::fill(acc, acc + qn * acc_ld, T(0));
  const int64_t limit = p.visible(q0 + qn);
  for (int64_t k0 = p.first_block(q0); k0 < limit; k0 += kKeyBlock) {
    const int64_t kn = std::min(kKeyBlock, limit - k0), ld = Right::row_length(kn);
    if (p.width > 0) {
      by_rows<T>(p, q0, qn, k0, kn, [&](int64_t i, int64_t rows, int64_t seen) {
        keys_t.multiply({rows, seen, p.width}, static_cast<T>(p.scale), q.data + (q0 + i) * q.ld,
                        q.ld, 1, 0, k0, T(0), scores + i * ld, ld);
      });
    } else {
      std::fill(scores, scores + qn * ld, T(0));
    }
    mask_scores(p, scores, ld, b, h, q0, qn, k0, kn);
    for (int64_t i = 0; i < qn; ++i) {
      const Row<T> row(p, scores, ld, q0 + i, i, k0, kn);
      T* line = row.line;
      const T block_top = row_max(line, row.seen);
      const T next = block_top > top[i] || block_top != block_top ? block_top : top[i];
      if (next == -std::numeric_limits<T>::infinity()) {
        row.clear(line);
        continue;
      }
      for (int64_t j = 0; j < row.computed; ++j) line[j] = exp_nonpositive(line[j] - next);
      row.clear_unseen(line);
      const T block_sum = row_sum(line, row.computed);
      if (next != top[i]) {
        const T correction = std::exp(top[i] - next);
        total[i] *= correction;
        if (k0 > 0) {
          for (int64_t c = 0; c < p.value_width; ++c) acc[i * acc_ld + c] *= correction;
        }
        top[i] = next;
      }
      total[i] += block_sum;
      if (p.dropout > 0) {
        T* factors = scratch<T>(Scratch::Row3, kn);
        dropout_row(p, factors, b, h, q0 + i, k0, row.seen);
        for (int64_t j = 0; j < row.seen; ++j) line[j] *= factors[j];
      }
    }
    if (p.value_width > 0) {
      by_rows<T>(p, q0, qn, k0, kn, [&](int64_t i, int64_t rows, int64_t seen) {
        values.multiply({rows, p.value_width, seen}, T(1), scores + i * ld, ld, 1, k0, 0,
                        k0 == 0 ? T(0) : T(1), acc + i * acc_ld, acc_ld);
      });
    }
  }
  for (int64_t i = 0; i < qn; ++i) {
    const T inverse = total[i] > 0 || total[i] != total[i] ? T(1) / total[i] : T(0);
    for (int64_t c = 0; c < p.value_width; ++c) acc[i * acc_ld + c] *= inverse;
    lses[i] = top[i] + std::log(total[i]);
  }
  store_rows(out, b, h, q0, qn, acc, acc_ld);
}

void forward(const Tensor& out, const Tensor& lse, const Tensor& rng_state, const Tensor& query,
             const Tensor& key, const Tensor& value, const Tensor& mask, double dropout_p,
             bool is_causal, double scale, const PhiloxArgs& rng) {
  if (rng_state.numel() > 0) {
    rng_state.data_as<int64_t>()[0] = static_cast<int64_t>(rng.seed);
    rng_state.data_as<int64_t>()[1] = static_cast<int64_t>(rng.offset);
  }
  const Problem p(query, key, value, mask, dropout_p, is_causal, scale, rng);
  const int64_t per_head = (p.queries + kQueryBlock - 1) / kQueryBlock;
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, p.batch * p.heads * per_head, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t pair = at / per_head, b = pair / p.heads, h = pair % p.heads;
        const int64_t kv = h / (p.heads / p.key_heads);
        const Head<T> q(query, b, h, Scratch::Query), k(key, b, kv, Scratch::Key),
            v(value, b, kv, Scratch::Value);
        const RightOperand<T> keys_t(Scratch::KeyPanels, k.data, 1, k.ld, p.width, p.keys);
        const RightOperand<T> values(Scratch::ValuePanels, v.data, v.ld, 1, p.keys, p.value_width);
        for (; at < end && at / per_head == pair; ++at) {
          const int64_t q0 = at % per_head * kQueryBlock;
          forward_block(p, out, lse.data_as<T>() + pair * p.queries + q0, q, keys_t, values, b, h,
                        q0, std::min(kQueryBlock, p.queries - q0));
        }
      }
    });
  });
}

void forward_varlen(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key,
                    const Tensor& value, const Tensor& cu_seq_q, const Tensor& cu_seq_k,
                    int64_t left, int64_t right, double scale) {
  const Sequences sequences(query, key, value, cu_seq_q, cu_seq_k, left, right, scale);
  sequences.clear_uncovered(sequences.query_starts, out, 0, 0.0);
  sequences.clear_uncovered(sequences.query_starts, lse, 1,
                            -std::numeric_limits<double>::infinity());
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, sequences.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const size_t index = sequences.of_block(at);
        const Problem& p = sequences.problems[index];
        const int64_t start = sequences.first_block[index],
                      per_head = (p.queries + kQueryBlock - 1) / kQueryBlock,
                      h = (at - start) / per_head, kv = h / (p.heads / p.key_heads);
        const Tensor target = sequences.queries_of(out, index);
        const Tensor q_rows = sequences.queries_of(query, index),
                     k_rows = sequences.keys_of(key, index),
                     v_rows = sequences.keys_of(value, index);
        const Head<T> q(q_rows, 0, h, Scratch::Query), k(k_rows, 0, kv, Scratch::Key),
            v(v_rows, 0, kv, Scratch::Value);
        const RightOperand<T> keys_t(Scratch::KeyPanels, k.data, 1, k.ld, p.width, p.keys);
        const RightOperand<T> values(Scratch::ValuePanels, v.data, v.ld, 1, p.keys, p.value_width);
        T* lses = lse.data_as<T>() + h * query.sizes()[0] + sequences.query_starts[index];
        for (; at < end && at < start + (h + 1) * per_head; ++at) {
          const int64_t q0 = (at - start) % per_head * kQueryBlock;
          forward_block(p, target, lses + q0, q, keys_t, values, 0, h, q0,
                        std::min(kQueryBlock, p.queries - q0));
        }
      }
    });
  });
}

/// The factors that multiply the probabilities: for formulas that need the matrix itself.
void dropout_factors(const Tensor& out, const Tensor& rng_state, const Tensor& query,
                     const Tensor& key, double dropout_p) {
  const int64_t* state = rng_state.data_as<int64_t>();
  const Problem p(query, key, key, Tensor(), dropout_p, false, 1,
                  {static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1])});
  visit_float(compute_type(query), [&]<class T>() {
    T* row = scratch<T>(Scratch::Row0, p.keys);
    for (int64_t at = 0; at < p.batch * p.heads * p.queries; ++at) {
      dropout_row(p, row, at / (p.heads * p.queries), at / p.queries % p.heads, at % p.queries, 0,
                  p.keys);
      if (out.dtype() == DTypeOf<T>::value)
        std::copy(row, row + p.keys, out.data_as<T>() + at * p.keys);
      else
        store_row<T>(out.data(), out.dtype(), at * p.keys, p.keys, row);
    }
  });
}

const RegisterCpu register_attention([](KernelTable& t) {
  t._attention = forward;
  t._attention_dropout_factors = dropout_factors;
  t._attention_varlen = forward_varlen;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
