// Blocks of scaled dot-product attention, for its forward and backward passes. Shapes: query
// (B, H, L, E), key (B, Hk, S, E), value (B, Hk, S, Ev); query head h reads key head h / (H / Hk).
// Any strides. Dropout draws element ((b·H + h)·L + i)·S + j of the op's counters.
#pragma once

#include "cpu/kernels/block_product.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace attention {

inline constexpr int64_t kQueryBlock = 64, kKeyBlock = 256;

inline DType compute_type(const Tensor& t) {
  return t.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}

struct Problem {
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  bool causal;                    // keys end at a diagonal
  int64_t ahead = 0;              // keys beyond its own index that a query sees then
  int64_t behind = 0, left = -1;  // the first key is at query + behind - left; all if left < 0
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
  /// A window of keys around each query, from `before` it to `after` it, without end where
  /// negative. The last query is level with the last key.
  void set_window(int64_t before, int64_t after) {
    behind = keys - queries;
    left = before;
    causal = after >= 0;
    // What reaches beyond the keys is without end, too.
    ahead = causal ? behind + std::min(after, queries + keys) : 0;
  }
  /// Keys that rows before `last_query` may see.
  int64_t visible(int64_t last_query) const {
    return causal ? std::clamp<int64_t>(last_query + ahead, 0, keys) : keys;
  }
  /// How many of the keys [k0, k0 + kn) they see.
  int64_t seen(int64_t last_query, int64_t k0, int64_t kn) const {
    return causal ? std::clamp<int64_t>(last_query + ahead - k0, 0, kn) : kn;
  }
  /// The first key that `query` may see.
  int64_t first_key(int64_t query) const {
    return left < 0 || left > query + behind ? 0 : std::min(query + behind - left, keys);
  }
  /// The first key of the first block that a query from `query` on may see.
  int64_t first_block(int64_t query) const;
};

inline int64_t Problem::first_block(int64_t query) const {
  return first_key(query) / kKeyBlock * kKeyBlock;
}

/// One head of a (B, H, T, D) operand as rows with unit stride: in place, or copied to scratch.
/// Rows that lie 4 KB apart are copied too: they would share one set of the first-level cache.
template <class T>
struct Head {
  const T* data;
  int64_t ld;
  Head(const Tensor& t, int64_t b, int64_t h, Scratch use) {
    const auto s = t.strides();
    const int64_t rows = t.sizes()[2], cols = t.sizes()[3], size = t.itemsize();
    const char* base = static_cast<const char*>(t.data()) + (b * s[0] + h * s[1]) * size;
    const bool dense_rows = (s[3] == 1 || cols == 1) && (s[2] >= cols || rows == 1);
    if (t.dtype() == DTypeOf<T>::value && dense_rows && s[2] * size % 4096 != 0) {
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

/// Applies the window and the mask to a block of scores.
template <class T>
void mask_scores(const Problem& p, T* scores, int64_t ld, int64_t b, int64_t h, int64_t q0,
                 int64_t qn, int64_t k0, int64_t kn) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  if (p.left >= 0) {
    for (int64_t i = 0; i < qn; ++i) {
      const int64_t hidden = std::min(p.first_key(q0 + i) - k0, p.seen(q0 + i + 1, k0, kn));
      if (hidden > 0) std::fill(scores + i * ld, scores + i * ld + hidden, kNever);
    }
  }
  if (!p.mask) return;
  const Tensor& mask = *p.mask;
  const int64_t* s = p.mask_strides;
  T* row = scratch<T>(Scratch::Row3, kn);
  for (int64_t i = 0; i < qn; ++i) {
    const int64_t at = b * s[0] + h * s[1] + (q0 + i) * s[2] + k0 * s[3];
    const int64_t seen = p.seen(q0 + i + 1, k0, kn);
    T* line = scores + i * ld;
    if (mask.dtype() == DType::Bool) {
      const bool* keep = mask.data_as<bool>() + at;
      for (int64_t j = 0; j < seen; ++j) line[j] = keep[j * s[3]] ? line[j] : kNever;
    } else {
      load_block<T>(row, static_cast<const char*>(mask.data()) + at * mask.itemsize(),
                    s[3] * mask.itemsize(), seen, mask.dtype(), DTypeOf<T>::value);
      for (int64_t j = 0; j < seen; ++j) line[j] += row[j];
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

/// One row of a block of scores: how much of it the row's query sees.
template <class T>
struct Row {
  T* line;
  int64_t seen;      // keys that count
  int64_t computed;  // keys to compute: whole vectors, as far as the products filled the row
  int64_t read;      // keys that later products read: those beyond `seen` have to be zero

  Row(const Problem& p, T* scores, int64_t ld, int64_t query, int64_t i, int64_t k0, int64_t kn)
      : line(scores + i * ld), seen(p.seen(query + 1, k0, kn)) {
    constexpr int64_t lanes = VectorOf<T>::lanes;
    computed = RightOperand<T>::kPacked ? (seen + lanes - 1) / lanes * lanes : seen;
    read = std::min(kn, seen + RightOperand<T>::kRows);
  }
  void clear_unseen(T* row) const { std::fill(row + seen, row + std::max(computed, read), T(0)); }
  void clear(T* row) const { std::fill(row, row + std::max(computed, read), T(0)); }
};

/// Calls f(first row, rows, keys that the last of them sees) for the steps of a block of queries.
template <class T, class F>
void by_rows(const Problem& p, int64_t q0, int64_t qn, int64_t k0, int64_t kn, const F& f) {
  for (int64_t i = 0; i < qn; i += RightOperand<T>::kRows) {
    const int64_t rows = std::min(RightOperand<T>::kRows, qn - i);
    if (const int64_t seen = p.seen(q0 + i + rows, k0, kn); seen > 0) f(i, rows, seen);
  }
}
/// Calls f(first key, keys, first query of the block that sees one of them).
template <class T, class F>
void by_keys(const Problem& p, int64_t q0, int64_t qn, int64_t k0, int64_t kn, const F& f) {
  for (int64_t j = 0; j < kn; j += RightOperand<T>::kRows) {
    const int64_t first = p.causal ? std::max<int64_t>(k0 + j - q0 - p.ahead, 0) : 0;
    if (first < qn) f(j, std::min(RightOperand<T>::kRows, kn - j), first);
  }
}

}  // namespace attention
}  // namespace vt::cpu::VT_ISA
