// layer_norm and rms_norm at the speed of memory, for rows of common dtypes and lengths. All of these
// write everything they are given, or nothing and return false where the plain kernels are to do it:
// for doubles, mixed dtypes other than 16-bit floats beside float32 ones, rows of a length that is no
// multiple of 4 or beyond a block's shared memory, and unaligned ones.
#pragma once

#include <vector>

#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

inline constexpr int64_t kLongestStreamedRow = 16384;
inline constexpr size_t kMostTerms = 3;  // that are added to an incoming gradient

/// Dense tensors on one device; undefined where absent. n elements a row.
struct NormRows {
  Tensor out, sum;  // sum: input + added, where that is defined
  Tensor mean;      // undefined: not centred
  Tensor rstd;
  Tensor input, added;
  Tensor weight, bias;
  double eps;
  int64_t rows, n;
  int64_t added_rows;  // those of added, which come again where they are fewer
};
bool stream_norm(const Launch& launch, const NormRows& g);

/// The same; undefined where absent or not wanted.
struct NormGradients {
  Tensor total;                   // the input's gradient, plus residual; may take its place
  Tensor low;                     // total again, rounded to a 16-bit float
  Tensor weight_sums, bias_sums;  // [n]: gradients of weight and bias
  Tensor row_sums;                // [n]: the sums over the rows of low, or else of total, as rounded
  Tensor grad, residual, input;
  std::vector<Tensor> terms;  // the gradient is grad + terms; at most kMostTerms
  Tensor weight;
  Tensor mean;  // undefined: not centred
  Tensor rstd;
  int64_t rows, n;
  int64_t parts = 0;  // or each sum is left in so many rows, [parts, n] in float
};
bool stream_norm_gradients(const Launch& launch, const NormGradients& g);

}  // namespace vt::cuda
