// Products of blocks that stay in the cache, on one thread, with a right operand used many times.
#pragma once

#include <type_traits>

#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm_tiles.h"

namespace vt::cpu::VT_ISA {

/// The right operand B of C = alpha · A @ B + beta · C: packed once in panels for the tile kernel,
/// or left where it lies for BLAS (doubles, and processors without AVX2).
template <class T>
class RightOperand {
 public:
  static constexpr bool kPacked = kHaveTiles && std::is_same_v<T, float>;
  /// Rows of a product that are computed together: a sensible step where k or n vary by row.
  static constexpr int64_t kRows = kPacked ? kTileRows : 64;
  /// Elements that a row of C with n columns occupies: whole panels are written.
  static constexpr int64_t row_length(int64_t n) { return kPacked ? whole_panels(n) : n; }

  /// Element (i, j) of k x n is at data + i·k_stride + j·column_stride; one of the strides is 1.
  RightOperand(Scratch use, const T* data, int64_t k_stride, int64_t column_stride, int64_t k,
               int64_t n)
      : data_(data),
        k_stride_(k_stride),
        column_stride_(column_stride),
        depth_(k),
        transposed_(column_stride != 1 || k_stride < n) {
    if constexpr (kPacked) {
      float* panels = scratch<float>(use, k * whole_panels(n));
      pack_panels(panels, data, k_stride, column_stride, k, n);
      data_ = panels;
    }
  }

  /// With rows [k0, k0 + s.k) and columns [n0, n0 + s.n) of B; n0 is a multiple of 64. A has dense
  /// rows (a_k is 1) or dense columns (a_row is 1).
  void multiply(GemmShape s, T alpha, const T* a, int64_t a_row, int64_t a_k, int64_t k0,
                int64_t n0, T beta, T* c, int64_t ldc) const {
    if constexpr (kPacked) {
      multiply_panels(s, alpha, a, a_row, a_k, data_ + n0 * depth_, depth_, k0, beta, c, ldc);
    } else {
      const bool columns = a_k != 1 || a_row < s.k;
      blas_gemm(columns, transposed_, s, alpha, a, columns ? a_k : a_row,
                data_ + k0 * k_stride_ + n0 * column_stride_,
                transposed_ ? column_stride_ : k_stride_, beta, c, ldc);
    }
  }

 private:
  const T* data_;
  int64_t k_stride_, column_stride_, depth_;
  bool transposed_;  // columns are dense
};

}  // namespace vt::cpu::VT_ISA
