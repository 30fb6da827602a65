// What norms need to know of a row that its threads hold in registers.
#pragma once

#include "cuda/kernels/rows.cuh"

namespace vt::cuda {

template <class T>
struct Moments {
  T mean, rstd;  // rstd: 1 / sqrt(mean of (x - mean)^2 + eps)
};

/// Moments of a row of `n` elements, for all of its threads; not centred, the mean counts as 0. Piece c
/// of a thread is the W elements from W * (c * blockDim.x + threadIdx.x), all or none of them below n.
/// `shared` as in row_reduce.
template <class T, int kPieces, int W>
__device__ inline Moments<T> row_moments(const T (&value)[kPieces][W], bool centred, T eps, int n,
                                         T* shared) {
  const int step = blockDim.x * W, first = threadIdx.x * W;
  T mean = T(0);
  if (centred) {
    T sum = T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) sum += value[c][k];
    }
    mean = row_reduce(sum, Plus(), shared) / static_cast<T>(n);
  }
  T squares = T(0);
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    if (c * step + first >= n) break;
#pragma unroll
    for (int k = 0; k < W; ++k) squares += (value[c][k] - mean) * (value[c][k] - mean);
  }
  squares = row_reduce(squares, Plus(), shared) / static_cast<T>(n);
  return {mean, T(1) / sqrt(squares + eps)};
}

}  // namespace vt::cuda
