// How kernels that hold rows of a gradient make their sums (attention_sums.h): they add up the rows
// that they write, as they are written, and leave a row of partial sums for each block (or warp); a
// second kernel adds these in their order. The bits are the same each time.
#pragma once

#include "cuda/kernels/attention_head.cuh"
#include "cuda/kernels/attention_sums.h"
#include "cuda/kernels/column_sums.cuh"

namespace vt::cuda::attention {

/// Rows of partial sums, heads times their width each; null: not wanted.
struct SumParts {
  float *query = nullptr, *key = nullptr, *value = nullptr;
};

/// Memory for the partial sums of gradients, for the rest of a scope.
class PartialSums {
 public:
  /// query_rows, key_rows: rows of partial sums, of the query's gradient, and of the key's and the
  /// value's.
  PartialSums(const Launch& launch, const GradientSums& sums, int64_t query_rows,
              int64_t key_rows);
  const SumParts& parts() const { return parts_; }
  /// Adds them up.
  void add(const Launch& launch) const;

 private:
  const GradientSums& sums_;
  int64_t query_rows_, key_rows_;
  Scratch memory_;
  SumParts parts_;
};

__device__ inline void clear_piece(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

/// Sums of 16 rows, by tensor cores: rows of ones times columns in blocks of 8. As every row of a
/// product is the sums, a lane keeps those of block lane / 4: columns 2 lane and the next. Of 32
/// columns the upper lanes keep the same as the lower.
template <class S, int kWidth = kHeadWidth>
struct ColumnBlocks {
  static constexpr int kPieces = pieces_of<kWidth>;
  float sums[kPieces][4];

  /// Block n as a right operand.
  __device__ void set(int n, uint32_t b0, uint32_t b1) {
    const uint32_t one = pack<S>(1.f, 1.f);
    const uint32_t ones[4] = {one, one, one, one};
    multiply<S>(sums[n], ones, b0, b1);
  }
  __device__ float2 of_lane() const {
    float2 x[kPieces];
#pragma unroll
    for (int n = 0; n < kPieces; ++n) x[n] = make_float2(sums[n][0], sums[n][1]);
    if constexpr (kPieces == 8) keep<16, 4>(x);
    keep<8, 2>(x);
    keep<4, 1>(x);
    return x[0];
  }

 private:
  /// The upper or the lower kCount of twice as many.
  template <int kBit, int kCount>
  __device__ static void keep(float2 (&x)[kPieces]) {
    const bool upper = threadIdx.x & kBit;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      x[n].x = upper ? x[n + kCount].x : x[n].x;
      x[n].y = upper ? x[n + kCount].y : x[n].y;
    }
  }
};

/// write_rows(), and with kSums what the rows that it writes add up to in the lane's two columns.
template <bool kSums, class S, int kWidth>
__device__ inline float2 write_rows_and_sum(S* to, int64_t stride, uint32_t rows,
                                            const Lanes<kWidth>& at, int first, int length) {
  write_rows(to, stride, rows, at, first, length);
  if constexpr (!kSums) {
    return make_float2(0.f, 0.f);
  } else {
    if (first + 16 > length) {  // rows beyond the sequence may be NaN
      const int row = first + static_cast<int>(threadIdx.x % kWarp) / at.kPieces;
#pragma unroll
      for (int i = 0; i < at.kAccesses; ++i) {
        if (row + at.kRowsAtOnce * i >= length) clear_piece(at.piece_of(rows, i));
      }
      __syncwarp();
    }
    ColumnBlocks<S, kWidth> blocks;
#pragma unroll
    for (int n = 0; n < at.kPieces; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, (rows + at.left) ^ (n << 4));
      blocks.set(n, b[0], b[1]);
      blocks.set(n + 1, b[2], b[3]);
    }
    return blocks.of_lane();
  }
}

/// Where a warp leaves its sums in shared memory: a row each of query, key and value.
enum SumsOf : int { kOfQuery, kOfKey, kOfValue };
inline constexpr int kWarpSums = 3 * kHeadWidth;

template <int kWidth = kHeadWidth>
__device__ inline void leave_sums(float* of_warp, SumsOf kind, float2 sums) {
  const int lane = threadIdx.x % kWarp;
  if (lane * 2 < kWidth) *reinterpret_cast<float2*>(of_warp + kind * kWidth + lane * 2) = sums;
}

/// The block's partial sums, from `at` on in rows of these: what its warps left, from the kind `first`
/// to `last`, `stride` floats apart. All of the block's threads call it, after a barrier.
template <int kWidth = kHeadWidth>
__device__ inline void write_partial_sums(const SumParts& parts, int64_t at, SumsOf first,
                                          SumsOf last, const float* of_warps, int stride,
                                          int warps) {
  for (int c = first * kWidth + static_cast<int>(threadIdx.x); c < (last + 1) * kWidth;
       c += static_cast<int>(blockDim.x)) {
    const int kind = c / kWidth;
    float* const to = kind == kOfQuery ? parts.query : kind == kOfKey ? parts.key : parts.value;
    if (!to) continue;
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += of_warps[w * stride + c];
    to[at + c % kWidth] = total;
  }
}

}  // namespace vt::cuda::attention
