// Scaled dot-product attention in blocks: no T×T matrix is kept. Forward runs an online softmax
// over blocks of keys and saves one log-sum-exp a query; backward recomputes each block of
// probabilities from it. Source: Dao et al., "FlashAttention", NeurIPS 2022, and its second part.
// Blocks are products through BLAS on one thread; (batch, head) pairs are spread over the pool.
// Shapes: query (B, H, L, E), key (B, Hk, S, E), value (B, Hk, S, Ev); query head h reads key head
// h / (H / Hk). Any strides. Dropout draws element ((b·H + h)·L + i)·S + j of the op's counters.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kQueryBlock = 64, kKeyBlock = 256;

DType compute_type(const Tensor& t) {
  return t.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}

struct Problem {
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  bool causal;
  double scale, dropout;
  PhiloxArgs rng;
  const Tensor* mask;
  int64_t mask_strides[4];

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& attn_mask,
          double dropout_p, bool is_causal, double factor, PhiloxArgs random)
      : batch(q.sizes()[0]),
        heads(q.sizes()[1]),
        key_heads(k.sizes()[1]),
        queries(q.sizes()[2]),
        keys(k.sizes()[2]),
        width(q.sizes()[3]),
        value_width(v.sizes()[3]),
        causal(is_causal),
        scale(factor),
        dropout(dropout_p),
        rng(random),
        mask(attn_mask.defined() ? &attn_mask : nullptr) {
    if (!mask) return;
    const int64_t shape[4] = {batch, heads, queries, keys};
    for (int64_t d = 0; d < 4; ++d) {
      const int64_t at = d - (4 - mask->dim());
      mask_strides[d] =
          at < 0 || (mask->sizes()[at] == 1 && shape[d] != 1) ? 0 : mask->strides()[at];
    }
  }
  /// Keys that rows before `last_query` may see.
  int64_t visible(int64_t last_query) const { return causal ? std::min(keys, last_query) : keys; }
};

/// One head of a (B, H, T, D) operand as rows with unit stride: in place, or copied to scratch.
template <class T>
struct Head {
  const T* data;
  int64_t ld;
  Head(const Tensor& t, int64_t b, int64_t h, Scratch use) {
    const auto s = t.strides();
    const int64_t rows = t.sizes()[2], cols = t.sizes()[3], size = t.itemsize();
    const char* base = static_cast<const char*>(t.data()) + (b * s[0] + h * s[1]) * size;
    if (t.dtype() == DTypeOf<T>::value && (s[3] == 1 || cols == 1) && (s[2] >= cols || rows == 1)) {
      data = reinterpret_cast<const T*>(base);
      ld = rows == 1 ? cols : s[2];
      return;
    }
    T* copy = scratch<T>(use, rows * cols);
    for (int64_t i = 0; i < rows; ++i) {
      load_block<T>(copy + i * cols, base + i * s[2] * size, s[3] * size, cols, t.dtype(),
                    DTypeOf<T>::value);
    }
    data = copy;
    ld = cols;
  }
};

template <class T>
void store_rows(const Tensor& t, int64_t b, int64_t h, int64_t first, int64_t rows, const T* from,
                int64_t ld) {
  const auto s = t.strides();
  const int64_t cols = t.sizes()[3], size = t.itemsize();
  char* base = static_cast<char*>(t.data()) + (b * s[0] + h * s[1] + first * s[2]) * size;
  for (int64_t i = 0; i < rows; ++i) {
    if (t.dtype() == DTypeOf<T>::value && s[3] == 1) {
      std::copy(from + i * ld, from + i * ld + cols, reinterpret_cast<T*>(base + i * s[2] * size));
    } else {
      store_block<T>(base + i * s[2] * size, s[3] * size, from + i * ld, cols, t.dtype());
    }
  }
}

/// Scales a block of scores and applies the causal limit and the mask.
template <class T>
void mask_scores(const Problem& p, T* scores, int64_t b, int64_t h, int64_t q0, int64_t qn,
                 int64_t k0, int64_t kn) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  if (p.mask) {
    const Tensor& mask = *p.mask;
    const int64_t* s = p.mask_strides;
    T* row = scratch<T>(Scratch::Row3, kn);
    for (int64_t i = 0; i < qn; ++i) {
      const int64_t at = b * s[0] + h * s[1] + (q0 + i) * s[2] + k0 * s[3];
      T* line = scores + i * kn;
      if (mask.dtype() == DType::Bool) {
        const bool* keep = mask.data_as<bool>() + at;
        for (int64_t j = 0; j < kn; ++j) line[j] = keep[j * s[3]] ? line[j] : kNever;
      } else {
        load_block<T>(row, static_cast<const char*>(mask.data()) + at * mask.itemsize(),
                      s[3] * mask.itemsize(), kn, mask.dtype(), DTypeOf<T>::value);
        for (int64_t j = 0; j < kn; ++j) line[j] += row[j];
      }
    }
  }
  if (p.causal && k0 + kn > q0 + 1) {
    for (int64_t i = 0; i < qn; ++i) {
      const int64_t allowed = std::clamp<int64_t>(q0 + i + 1 - k0, 0, kn);
      std::fill(scores + i * kn + allowed, scores + (i + 1) * kn, kNever);
    }
  }
}

/// factors[j] = 1/(1−p) where element j of this row's part is kept, else 0.
template <class T>
void dropout_row(const Problem& p, T* factors, int64_t b, int64_t h, int64_t query, int64_t k0,
                 int64_t kn) {
  const uint64_t first =
      static_cast<uint64_t>(((b * p.heads + h) * p.queries + query) * p.keys + k0);
  const T keep = p.dropout < 1 ? static_cast<T>(1 / (1 - p.dropout)) : T(0);
  Philox4 numbers{};
  for (int64_t j = 0; j < kn; ++j) {
    const uint64_t at = first + static_cast<uint64_t>(j);
    if (j == 0 || at % 4 == 0) numbers = philox(p.rng.seed, p.rng.offset + at / 4);
    factors[j] = uniform_float(numbers.value[at % 4]) < static_cast<float>(p.dropout) ? T(0) : keep;
  }
}

template <class T>
void forward_block(const Problem& p, const Tensor& out, const Tensor& lse, const Head<T>& q,
                   const Head<T>& k, const Head<T>& v, int64_t b, int64_t h, int64_t q0,
                   int64_t qn) {
  T* scores = scratch<T>(Scratch::Scores, kQueryBlock * kKeyBlock);
  T* acc = scratch<T>(Scratch::Output, kQueryBlock * p.value_width);
  T top[kQueryBlock], total[kQueryBlock];
  std::fill(top, top + qn, -std::numeric_limits<T>::infinity());
  std::fill(total, total + qn, T(0));
  std::fill(acc, acc + qn * p.value_width, T(0));
  const int64_t limit = p.visible(q0 + qn);
  for (int64_t k0 = 0; k0 < limit; k0 += kKeyBlock) {
    const int64_t kn = std::min(kKeyBlock, limit - k0);
    if (p.width > 0) {
      blas_gemm(false, true, {qn, kn, p.width}, static_cast<T>(p.scale), q.data + q0 * q.ld, q.ld,
                k.data + k0 * k.ld, k.ld, T(0), scores, kn);
    } else {
      std::fill(scores, scores + qn * kn, T(0));
    }
    mask_scores(p, scores, b, h, q0, qn, k0, kn);
    for (int64_t i = 0; i < qn; ++i) {
      T* line = scores + i * kn;
      // Beyond the causal limit of this row everything is -inf: those columns need no exp.
      const int64_t seen = p.causal ? std::clamp<int64_t>(q0 + i + 1 - k0, 0, kn) : kn;
      const T block_top = row_max(line, seen);
      const T next = block_top > top[i] || block_top != block_top ? block_top : top[i];
      if (next == -std::numeric_limits<T>::infinity()) {
        std::fill(line, line + kn, T(0));
        continue;
      }
      const T block_sum = row_exp(line, line, T(1), next, seen);
      std::fill(line + seen, line + kn, T(0));
      if (next != top[i]) {
        const T correction = std::exp(top[i] - next);
        total[i] *= correction;
        if (k0 > 0) {
          for (int64_t c = 0; c < p.value_width; ++c) acc[i * p.value_width + c] *= correction;
        }
        top[i] = next;
      }
      total[i] += block_sum;
      if (p.dropout > 0) {
        T* factors = scratch<T>(Scratch::Row3, kn);
        dropout_row(p, factors, b, h, q0 + i, k0, kn);
        for (int64_t j = 0; j < kn; ++j) line[j] *= factors[j];
      }
    }
    if (p.value_width > 0) {
      blas_gemm(false, false, {qn, p.value_width, kn}, T(1), scores, kn, v.data + k0 * v.ld, v.ld,
                k0 == 0 ? T(0) : T(1), acc, p.value_width);
    }
  }
  T* lses = lse.data_as<T>() + (b * p.heads + h) * p.queries + q0;
  for (int64_t i = 0; i < qn; ++i) {
    const T inverse = total[i] > 0 || total[i] != total[i] ? T(1) / total[i] : T(0);
    for (int64_t c = 0; c < p.value_width; ++c) acc[i * p.value_width + c] *= inverse;
    lses[i] = top[i] + std::log(total[i]);
  }
  store_rows(out, b, h, q0, qn, acc, p.value_width);
}

void forward(const Tensor& out, const Tensor& lse, const Tensor& rng_state, const Tensor& query,
             const Tensor& key, const Tensor& value, const Tensor& mask, double dropout_p,
             bool is_causal, double scale, const PhiloxArgs& rng) {
  rng_state.data_as<int64_t>()[0] = static_cast<int64_t>(rng.seed);
  rng_state.data_as<int64_t>()[1] = static_cast<int64_t>(rng.offset);
  const Problem p(query, key, value, mask, dropout_p, is_causal, scale, rng);
  const int64_t per_head = (p.queries + kQueryBlock - 1) / kQueryBlock;
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, p.batch * p.heads * per_head, 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t pair = at / per_head, b = pair / p.heads, h = pair % p.heads;
        const int64_t kv = h / (p.heads / p.key_heads);
        const Head<T> q(query, b, h, Scratch::Query), k(key, b, kv, Scratch::Key),
            v(value, b, kv, Scratch::Value);
        for (; at < end && at / per_head == pair; ++at) {
          const int64_t q0 = at % per_head * kQueryBlock;
          forward_block(p, out, lse, q, k, v, b, h, q0, std::min(kQueryBlock, p.queries - q0));
        }
      }
    });
  });
}

/// Gradients of one query head. dk and dv are added to: a key head serves several query heads.
template <class T>
void backward_head(const Problem& p, const Tensor& grad_query, const Tensor& grad,
                   const Tensor& output, const Tensor& lse, const Tensor& query, const Head<T>& k,
                   const Head<T>& v, T* dk, T* dv, int64_t b, int64_t h) {
  const Head<T> q(query, b, h, Scratch::Query), g(grad, b, h, Scratch::Output),
      o(output, b, h, Scratch::Extra);
  T* prob = scratch<T>(Scratch::Scores, kQueryBlock * kKeyBlock);
  T* dprob = scratch<T>(Scratch::Gradients, kQueryBlock * kKeyBlock);
  T* dq = scratch<T>(Scratch::Row0, kQueryBlock * p.width);
  T* factors = p.dropout > 0 ? scratch<T>(Scratch::Row1, kQueryBlock * kKeyBlock) : nullptr;
  const T* lses = lse.data_as<T>() + (b * p.heads + h) * p.queries;
  const T scale = static_cast<T>(p.scale);
  T along[kQueryBlock];
  for (int64_t q0 = 0; q0 < p.queries; q0 += kQueryBlock) {
    const int64_t qn = std::min(kQueryBlock, p.queries - q0);
    for (int64_t i = 0; i < qn; ++i)
      along[i] = row_dot(g.data + (q0 + i) * g.ld, o.data + (q0 + i) * o.ld, p.value_width);
    std::fill(dq, dq + qn * p.width, T(0));
    const int64_t limit = p.visible(q0 + qn);
    for (int64_t k0 = 0; k0 < limit; k0 += kKeyBlock) {
      const int64_t kn = std::min(kKeyBlock, limit - k0);
      blas_gemm(false, true, {qn, kn, p.width}, scale, q.data + q0 * q.ld, q.ld, k.data + k0 * k.ld,
                k.ld, T(0), prob, kn);
      blas_gemm(false, true, {qn, kn, p.value_width}, T(1), g.data + q0 * g.ld, g.ld,
                v.data + k0 * v.ld, v.ld, T(0), dprob, kn);
      mask_scores(p, prob, b, h, q0, qn, k0, kn);
      for (int64_t i = 0; i < qn; ++i) {
        T* line = prob + i * kn;
        T* dline = dprob + i * kn;
        const T shift = lses[q0 + i];
        if (shift == -std::numeric_limits<T>::infinity()) {
          std::fill(line, line + kn, T(0));
          std::fill(dline, dline + kn, T(0));
          continue;
        }
        const int64_t seen = p.causal ? std::clamp<int64_t>(q0 + i + 1 - k0, 0, kn) : kn;
        if (factors) {
          T* keep = factors + i * kn;
          dropout_row(p, keep, b, h, q0 + i, k0, kn);
          for (int64_t j = 0; j < seen; ++j) {
            const T value = exp_nonpositive(line[j] - shift);
            dline[j] = value * (dline[j] * keep[j] - along[i]) * scale;
            line[j] = value * keep[j];
          }
        } else {
          for (int64_t j = 0; j < seen; ++j) {
            line[j] = exp_nonpositive(line[j] - shift);
            dline[j] = line[j] * (dline[j] - along[i]) * scale;
          }
        }
        std::fill(line + seen, line + kn, T(0));
        std::fill(dline + seen, dline + kn, T(0));
      }
      blas_gemm(true, false, {kn, p.value_width, qn}, T(1), prob, kn, g.data + q0 * g.ld, g.ld,
                T(1), dv + k0 * p.value_width, p.value_width);
      blas_gemm(true, false, {kn, p.width, qn}, T(1), dprob, kn, q.data + q0 * q.ld, q.ld, T(1),
                dk + k0 * p.width, p.width);
      blas_gemm(false, false, {qn, p.width, kn}, T(1), dprob, kn, k.data + k0 * k.ld, k.ld, T(1),
                dq, p.width);
    }
    store_rows(grad_query, b, h, q0, qn, dq, p.width);
  }
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
              const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& mask, const Tensor& output, const Tensor& lse, const Tensor& rng_state,
              double dropout_p, bool is_causal, double scale) {
  const int64_t* state = rng_state.data_as<int64_t>();
  const PhiloxArgs rng{static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1])};
  const Problem p(query, key, value, mask, dropout_p, is_causal, scale, rng);
  const int64_t per_key_head = p.heads / std::max<int64_t>(p.key_heads, 1);
  visit_float(compute_type(query), [&]<class T>() {
    parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t b = pair / p.key_heads, kv = pair % p.key_heads;
        const Head<T> k(key, b, kv, Scratch::Key), v(value, b, kv, Scratch::Value);
        T* dk = scratch<T>(Scratch::GemmA, p.keys * p.width);
        T* dv = scratch<T>(Scratch::GemmB, p.keys * p.value_width);
        std::fill(dk, dk + p.keys * p.width, T(0));
        std::fill(dv, dv + p.keys * p.value_width, T(0));
        if (p.width > 0 && p.value_width > 0) {
          for (int64_t h = kv * per_key_head; h < (kv + 1) * per_key_head; ++h) {
            backward_head(p, grad_query, grad, output, lse, query, k, v, dk, dv, b, h);
          }
        }
        store_rows(grad_key, b, kv, 0, p.keys, dk, p.width);
        store_rows(grad_value, b, kv, 0, p.keys, dv, p.value_width);
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
  t._attention_backward = backward;
  t._attention_dropout_factors = dropout_factors;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
