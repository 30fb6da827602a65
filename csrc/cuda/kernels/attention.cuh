// What the attention kernels share: the problem's shapes and strides, masks, dropout, and products
// of 64 x 64 tiles through shared memory. 256 threads; thread (ty, tx) of 16 x 16 holds rows
// 4 ty + i and columns tx + 16 j of a tile.
#pragma once

#include "core/generator.h"
#include "cuda/kernels/rows.cuh"

namespace vt::cuda::attention {

inline constexpr int kTile = 64;     // queries and keys of a tile
inline constexpr int kStep = 32;     // columns of an operand in shared memory at a time
inline constexpr int kThreads = 256;
inline constexpr int kScoreRow = kTile + 1;  // odd: columns fall into different banks
inline constexpr int kStepRow = kStep + 1;

/// A (B, H, T, D) operand with any strides, in elements.
template <class S>
struct Operand {
  S* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  Operand() = default;
  explicit Operand(const Tensor& t)
      : data(t.data_as<S>()),
        batch(t.strides()[0]),
        head(t.strides()[1]),
        row(t.strides()[2]),
        column(t.strides()[3]) {}
  __device__ S* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

/// An additive or boolean mask, broadcast by zero strides.
struct Mask {
  const char* data = nullptr;
  DType dtype = DType::Bool;
  int64_t batch = 0, head = 0, row = 0, column = 0;  // in bytes
};

template <class S>
struct Problem {
  using T = Compute<S>;
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  bool causal;
  T scale, keep;       // keep: 1 / (1 - dropout)
  float dropout;       // 0: none
  PhiloxArgs rng;      // forward
  const int64_t* rng_state = nullptr;  // backward: seed and offset
  Mask mask;
  Operand<S> query, key, value;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& attn_mask,
          double dropout_p, bool is_causal, double factor)
      : batch(q.sizes()[0]),
        heads(q.sizes()[1]),
        key_heads(k.sizes()[1]),
        queries(q.sizes()[2]),
        keys(k.sizes()[2]),
        width(q.sizes()[3]),
        value_width(v.sizes()[3]),
        causal(is_causal),
        scale(static_cast<T>(factor)),
        keep(dropout_p < 1 ? static_cast<T>(1 / (1 - dropout_p)) : T(0)),
        dropout(static_cast<float>(dropout_p)),
        query(q),
        key(k),
        value(v) {
    if (!attn_mask.defined()) return;
    mask.data = static_cast<const char*>(attn_mask.data());
    mask.dtype = attn_mask.dtype();
    const int64_t shape[4] = {batch, heads, queries, keys};
    int64_t* strides[4] = {&mask.batch, &mask.head, &mask.row, &mask.column};
    for (int64_t d = 0; d < 4; ++d) {
      const int64_t at = d - (4 - attn_mask.dim());
      const bool fixed = at < 0 || (attn_mask.sizes()[at] == 1 && shape[d] != 1);
      *strides[d] = fixed ? 0 : attn_mask.strides()[at] * attn_mask.itemsize();
    }
  }
  __device__ int64_t key_head(int64_t h) const { return h / (heads / key_heads); }
};

/// The scaled score of one query and key after the mask; -inf where the key is not to be seen.
template <class S, class T>
__device__ inline T masked_score(const Problem<S>& p, T dot, int64_t b, int64_t h, int64_t q,
                                 int64_t k) {
  if (q >= p.queries || k >= p.keys || (p.causal && k > q)) return minus_infinity<T>();
  T score = dot * p.scale;
  if (p.mask.data) {
    const char* at = p.mask.data + b * p.mask.batch + h * p.mask.head + q * p.mask.row +
                     k * p.mask.column;
    if (p.mask.dtype == DType::Bool)
      score = *reinterpret_cast<const bool*>(at) ? score : minus_infinity<T>();
    else
      score += load_as<T>(at, p.mask.dtype);
  }
  return score;
}

/// The counters of a launch: in a device program those of the state in the device's memory.
__device__ inline PhiloxArgs counters_of(const PhiloxArgs& rng) {
  if (!rng.state) return rng;
  return {rng.state[0], rng.state[1] + rng.offset};
}

/// What dropout multiplies element (b, h, q, k) by: element ((b·H + h)·L + q)·S + k of the op's
/// counters decides.
template <class S>
__device__ inline Compute<S> dropout_factor(const Problem<S>& p, PhiloxArgs rng, int64_t b,
                                            int64_t h, int64_t q, int64_t k) {
  const uint64_t at = static_cast<uint64_t>(((b * p.heads + h) * p.queries + q) * p.keys + k);
  const Philox4 numbers = philox(rng.seed, rng.offset + at / 4);
  const int lane = static_cast<int>(at % 4);
  const uint32_t bits = lane < 2 ? (lane == 0 ? numbers.value[0] : numbers.value[1])
                                 : (lane == 2 ? numbers.value[2] : numbers.value[3]);
  return uniform_float(bits) < p.dropout ? Compute<S>(0) : p.keep;
}

/// Rows [first, first + kTile) of a matrix with `rows` rows and `columns` columns; beyond: zeros.
template <class S>
struct Strip {
  const S* data;
  int64_t row, column;  // strides
  int64_t first, rows, columns;

  __device__ Strip(const Operand<S>& t, int64_t b, int64_t h, int64_t first_row, int64_t row_count,
                   int64_t column_count)
      : data(t.at(b, h)),
        row(t.row),
        column(t.column),
        first(first_row),
        rows(row_count),
        columns(column_count) {}
  template <class T>
  __device__ T get(int64_t r, int64_t c) const {
    return first + r < rows && c < columns
               ? convert<T>(data[(first + r) * row + c * column])
               : T(0);
  }
};

/// Shared memory of a block: a tile of scores, and operands on their way.
template <class T, int D>
struct Shared {
  T* scores;  // kTile x kScoreRow
  T* left;    // kTile x kStepRow
  T* right;   // kTile x kStepRow
  T* moving;  // kStep x D, over left and right, which are not in use then

  __device__ explicit Shared(char* memory)
      : scores(reinterpret_cast<T*>(memory)),
        left(scores + kTile * kScoreRow),
        right(left + kTile * kStepRow),
        moving(left) {}
  static constexpr int kBytes =
      (kTile * kScoreRow +
       (2 * kTile * kStepRow > kStep * D ? 2 * kTile * kStepRow : kStep * D)) *
      static_cast<int>(sizeof(T));
};

/// tile[i][j] = the dot product of row 4 ty + i of `a` and row tx + 16 j of `b`.
template <class S, class T, int D>
__device__ inline void dot_rows(T (&tile)[4][4], const Strip<S>& a, const Strip<S>& b,
                                const Shared<T, D>& shared) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[i][j] = T(0);
  }
  for (int64_t c0 = 0; c0 < a.columns; c0 += kStep) {
    __syncthreads();  // what was in left and right has been used
    for (int i = threadIdx.x; i < kTile * kStep; i += kThreads) {
      const int r = i / kStep, c = i % kStep;
      shared.left[r * kStepRow + c] = a.template get<T>(r, c0 + c);
      shared.right[r * kStepRow + c] = b.template get<T>(r, c0 + c);
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kStep; ++c) {
      T x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = shared.left[(ty * 4 + i) * kStepRow + c];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = shared.right[(tx + 16 * j) * kStepRow + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[i][j] += x[i] * y[j];
      }
    }
  }
}

/// sum[i][j] += Σ_r scores(4 ty + i, r) · x(r, column + tx + 16 j), over the kTile rows of `x`; with
/// kTransposed, scores(r, 4 ty + i).
template <bool kTransposed, class S, class T, int D>
__device__ inline void add_product(T (&sum)[4][D / 16], const Strip<S>& x, int64_t column,
                                   const Shared<T, D>& shared) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int r0 = 0; r0 < kTile; r0 += kStep) {
    __syncthreads();  // scores are written; what was in moving has been used
    for (int i = threadIdx.x; i < kStep * D; i += kThreads) {
      const int r = i / D, c = i % D;
      shared.moving[i] = x.template get<T>(r0 + r, column + c);
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kStep; ++r) {
      T a[4], y[D / 16];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = kTransposed ? shared.scores[(r0 + r) * kScoreRow + ty * 4 + i]
                           : shared.scores[(ty * 4 + i) * kScoreRow + r0 + r];
      }
#pragma unroll
      for (int j = 0; j < D / 16; ++j) y[j] = shared.moving[r * D + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < D / 16; ++j) sum[i][j] += a[i] * y[j];
      }
    }
  }
  __syncthreads();  // scores may be written again
}

/// Writes rows 4 ty + i, columns column + tx + 16 j of a result.
template <class S, class T, int N>
__device__ inline void store_tile(const Operand<S>& out, int64_t b, int64_t h, int64_t first,
                                  int64_t rows, int64_t column, int64_t columns,
                                  const T (&values)[4][N]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  S* base = out.at(b, h);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t r = first + ty * 4 + i;
    if (r >= rows) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t c = column + tx + 16 * j;
      if (c < columns) base[r * out.row + c * out.column] = convert<S>(values[i][j]);
    }
  }
}

template <class T, int N>
__device__ inline void clear(T (&values)[4][N]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] = T(0);
  }
}

/// Calls f.template operator()<S, D>(): storage, and the columns of a result a block computes. Wider
/// heads take several blocks, each of which computes the scores again.
template <class F>
void visit_widths(DType dtype, int64_t width, F&& f) {
  visit_float_storage(dtype, [&]<class S>() {
    if constexpr (sizeof(S) < 8) {
      if (width > 64) {
        f.template operator()<S, 128>();
        return;
      }
    }
    f.template operator()<S, 64>();
  });
}

/// One block an index: (batch, head) pairs, tiles of rows, parts of the columns.
inline dim3 tile_grid(int64_t pairs, int64_t tiles, int64_t parts) {
  const int64_t blocks = pairs * tiles * parts;
  check(blocks <= std::numeric_limits<int>::max(), "attention: ", pairs, " heads of ", tiles,
        " tiles are more than one launch can take; split the batch");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace vt::cuda::attention
