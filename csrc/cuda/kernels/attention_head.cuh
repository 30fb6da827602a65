// Attention of a head that a block holds in shared memory as a whole: what forward and backward
// share. Up to 128 rows of 64 16-bit floats, a warp for each 16 of them; every sum has one owner.
//
// An operand is kRows x 64 in shared memory, its rows 128 bytes apart and their 16-byte pieces
// exchanged within a row by the row's number, so that neither ldmatrix nor rows of pieces meet bank
// conflicts. Rows beyond the sequence are zeros.
#pragma once

#include "cuda/kernels/attention_mma.cuh"

namespace vt::cuda::attention {

inline constexpr int kHeadWidth = 64;
inline constexpr int kPieces = kHeadWidth / 8;  // of 16 bytes, in a row
inline constexpr float kLog2E = 1.4426950408889634f;

/// Operands of all heads. Rows are dense and aligned to 16 bytes.
template <class S>
struct HeadProblem {
  Operand<S> query, key, value;
  int heads, length;
  bool causal;
  float scale;
};

template <class S>
struct HeadTile {
  S* data;

  __device__ S* piece(int row, int p) const {
    return data + row * kHeadWidth + ((p ^ (row & 7)) << 3);
  }
  /// The address of a lane's row for ldmatrix: column is a multiple of 8.
  __device__ S* at(int row, int column) const { return piece(row, column >> 3); }

  /// Starts copying `length` rows of a head; zeros up to `rows`.
  __device__ void start(const S* from, int64_t stride, int length, int rows) const {
    for (int i = threadIdx.x; i < rows * kPieces; i += blockDim.x) {
      const int r = i / kPieces, p = i % kPieces;
      const S* source = from + (r < length ? r : 0) * stride + p * 8;
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(piece(r, p)));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source),
                   "r"(r < length ? 16 : 0)
                   : "memory");
    }
  }
  /// Writes a warp's 16 rows from `first` to a head. They lie in rows that no other warp uses.
  __device__ void write(S* to, int64_t stride, int first, int length) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + i * 4 + lane / kPieces, p = lane % kPieces;
      if (r < length)
        *reinterpret_cast<uint4*>(to + r * stride + p * 8) =
            *reinterpret_cast<const uint4*>(piece(r, p));
    }
  }
  /// Puts 16 x 64 sums, scaled, into the rows from `first`.
  __device__ void put(const float (&sums)[kPieces][4], float scale, int first) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        *reinterpret_cast<uint32_t*>(piece(r, n) + lane % 4 * 2) =
            pack<S>(sums[n][2 * half] * scale, sums[n][2 * half + 1] * scale);
      }
    }
  }
};

template <int kPending = 0>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// 16 rows from `row` as the left operand: four pieces of 16 columns.
template <class S>
__device__ inline void load_left(uint32_t (&a)[4][4], const HeadTile<S>& x, int row) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    load_matrices(a[k], x.at(row + matrix % 2 * 8 + line, k * 16 + matrix / 2 * 8));
}

/// c[n] = the left operand times rows [row + 8 n, row + 8 n + 8) of y, transposed; n < 2.
template <class S>
__device__ inline void dot_16(float (&c)[2][4], const uint32_t (&a)[4][4], const HeadTile<S>& y,
                              int row) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t b[4];
    load_matrices(b, y.at(row + matrix / 2 * 8 + line, k * 16 + matrix % 2 * 8));
    multiply_add<S>(c[0], a[k], b[0], b[1]);
    multiply_add<S>(c[1], a[k], b[2], b[3]);
  }
}

/// sum += a (16 x 16) times rows [row, row + 16) of y.
template <class S>
__device__ inline void add_16(float (&sum)[kPieces][4], const uint32_t (&a)[4],
                              const HeadTile<S>& y, int row) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int n = 0; n < kPieces; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, y.at(row + matrix % 2 * 8 + line, n * 8 + matrix / 2 * 8));
    multiply_add<S>(sum[n], a, b[0], b[1]);
    multiply_add<S>(sum[n + 1], a, b[2], b[3]);
  }
}

/// 16 x 16 values, as products leave them, as the left operand of another.
template <class S>
__device__ inline void pack_left(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = pack<S>(c[0][0], c[0][1]);
  a[1] = pack<S>(c[0][2], c[0][3]);
  a[2] = pack<S>(c[1][0], c[1][1]);
  a[3] = pack<S>(c[1][2], c[1][3]);
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vt::cuda::attention
