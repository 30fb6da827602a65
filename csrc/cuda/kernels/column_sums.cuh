// Sums over rows in two stages of fixed order: blocks write their own sums, a second kernel adds
// those up.
#pragma once

#include "cuda/kernels/elements.cuh"

namespace vt::cuda {

/// One result: out[c] = the sum over b of parts[b * n + c]. Nothing where `out` is absent.
template <class T>
struct ColumnParts {
  Elements out;
  const T* parts = nullptr;
};
inline constexpr int kMostColumnParts = 3;
template <class T>
struct ColumnPartsList {
  ColumnParts<T> results[kMostColumnParts];
  int count = 0;
  T scale = T(1);

  void add(const Tensor& out, const T* parts) {
    if (out.defined()) results[count++] = {Elements(out), parts};
  }
};

/// Adds up the parts of `blocks` blocks, in their order within 16 strided groups.
void add_column_parts(const Launch& launch, const ColumnPartsList<float>& list, int64_t n,
                      int64_t blocks);
void add_column_parts(const Launch& launch, const ColumnPartsList<double>& list, int64_t n,
                      int64_t blocks);

/// Zeros from a row of a matrix on, parts that no block writes.
void clear_rows(const Tensor& matrix, int64_t first, const Launch& launch);

/// Sums over the rows of a matrix of 16- or 32-bit floats with dense rows, in float, times scale.
struct ColumnSums {
  Elements out;   // [n]
  Elements data;  // row r begins at element r * stride
  int64_t rows, n, stride;
  float scale;
};
void column_sums(const Launch& launch, const ColumnSums& problem);

/// The sums of `batch` such matrices, `batch_stride` elements apart, left in `parts` rows each:
/// out, [batch, parts, n] in float. out.data and scale count for nothing.
void column_sums_in_parts(const Launch& launch, const ColumnSums& problem, float* out,
                          int64_t parts, int64_t batch, int64_t batch_stride);

}  // namespace vt::cuda
