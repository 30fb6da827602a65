// Attention of 16-bit floats on tensor cores: what its kernels share. A block of 4 warps owns 64
// rows (16 a warp: queries, or keys), and walks over tiles of 64 of the other kind in shared
// memory. Scores of a warp's 16 rows and a tile stay in registers, as 8 fragments of 16 x 8.
#pragma once

#include "cuda/kernels/attention.cuh"
#include "cuda/kernels/mma.cuh"

namespace vt::cuda::attention {

inline constexpr int kMmaThreads = 128;
inline constexpr int kFragments = kTile / 8;

/// A kTile x D tile in shared memory. Rows are 16 bytes longer, so that ldmatrix has no conflicts.
template <class S, int D>
struct MmaTile {
  static constexpr int kRow = D + 8;
  static constexpr int kBytes = kTile * kRow * static_cast<int>(sizeof(S));
  S* data;

  /// Rows [first, first + kTile) of a head; zeros beyond its rows and columns. Columns are adjacent,
  /// rows 16-byte aligned, `width` a multiple of 8.
  __device__ void load(const Operand<S>& t, int64_t b, int64_t h, int64_t first, int64_t rows,
                       int64_t width) const {
    constexpr int kPieces = D / 8;
    const S* base = t.at(b, h);
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kPieces; i += kMmaThreads) {
      const int r = i / kPieces, c = i % kPieces * 8;
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (first + r < rows && c < width)
        piece = *reinterpret_cast<const uint4*>(base + (first + r) * t.row + c);
      *reinterpret_cast<uint4*>(data + r * kRow + c) = piece;
    }
  }
};

/// c[n] = rows [row, row + 16) of x times rows [8 n, 8 n + 8) of y, transposed: 16 x 64 products.
template <class S, int D>
__device__ inline void dot_tile(float (&c)[kFragments][4], const MmaTile<S, D>& x, int row,
                                const MmaTile<S, D>& y) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[4];
    load_matrices(a, x.data + (row + matrix % 2 * 8 + line) * x.kRow + k + matrix / 2 * 8);
#pragma unroll
    for (int n = 0; n < kFragments; n += 2) {
      uint32_t b[4];
      load_matrices(b, y.data + (n * 8 + matrix / 2 * 8 + line) * y.kRow + k + matrix % 2 * 8);
      multiply_add<S>(c[n], a, b[0], b[1]);
      multiply_add<S>(c[n + 1], a, b[2], b[3]);
    }
  }
}

template <class S>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

/// sum += p y: p's 16 x 64 values, rounded to S, times a 64 x D tile.
template <class S, int D>
__device__ inline void add_tile(float (&sum)[D / 8][4], const float (&p)[kFragments][4],
                                const MmaTile<S, D>& y) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int k = 0; k < kTile; k += 16) {
    const float(&left)[4] = p[k / 8];
    const float(&right)[4] = p[k / 8 + 1];
    const uint32_t a[4] = {pack<S>(left[0], left[1]), pack<S>(left[2], left[3]),
                           pack<S>(right[0], right[1]), pack<S>(right[2], right[3])};
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      uint32_t b[4];
      load_matrices_transposed(
          b, y.data + (k + matrix % 2 * 8 + line) * y.kRow + n + matrix / 2 * 8);
      multiply_add<S>(sum[n / 8], a, b[0], b[1]);
      multiply_add<S>(sum[n / 8 + 1], a, b[2], b[3]);
    }
  }
}

template <int N>
__device__ inline void clear_fragments(float (&values)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[n][i] = 0.f;
  }
}

/// Writes 16 rows from `first` of a result, two columns at a time.
template <class S, int D>
__device__ inline void store_fragments(const Operand<S>& out, int64_t b, int64_t h, int64_t first,
                                       int64_t rows, int64_t width,
                                       const float (&values)[D / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  S* base = out.at(b, h);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = first + lane / 4 + 8 * half;
    if (r >= rows) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int c = n * 8 + lane % 4 * 2;
      if (c < width) {
        *reinterpret_cast<uint32_t*>(base + r * out.row + c) =
            pack<S>(values[n][2 * half], values[n][2 * half + 1]);
      }
    }
  }
}

/// Whether an operand's rows can be read in 16-byte pieces.
template <class S>
bool in_pieces(const Operand<S>& t) {
  return t.column == 1 && is_aligned(t.data) && t.row % 8 == 0 && t.head % 8 == 0 &&
         t.batch % 8 == 0;
}
inline bool mma_width(int64_t width) { return width > 0 && width <= 128 && width % 8 == 0; }

/// The forward kernel on tensor cores. False where the operands do not allow it.
bool mma_forward(const Launch& launch, const Tensor& out, const Tensor& lse,
                 const Tensor& rng_state, const Tensor& query, const Tensor& key,
                 const Tensor& value, const Tensor& mask, double dropout_p, bool is_causal,
                 double scale, const PhiloxArgs& rng);
/// The backward kernels. `along`: Σ grad · output of every query.
bool mma_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                  const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                  const Tensor& key, const Tensor& value, const Tensor& mask, const float* lse,
                  const float* along, const Tensor& rng_state, double dropout_p, bool is_causal,
                  double scale);

}  // namespace vt::cuda::attention
