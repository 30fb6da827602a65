// The single-precision product on AVX2 and AVX-512: of larger matrices on the thread pool, and of
// blocks on one thread.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {

/// C is computed in tiles of kTileRows x kTilePanel.
inline constexpr int64_t kTilePanel = 2 * VectorOf<float>::lanes;
inline constexpr int64_t kTileRows = VectorOf<float>::lanes == 16 ? 12 : 6;
/// False where BLAS is the better choice whatever the shape.
inline constexpr bool kHaveTiles = VectorOf<float>::lanes >= 8;

/// C = alpha · A @ B + (bias in every row, or beta · C) on the thread pool, for operands of any
/// strides and dense rows in C. False, with nothing done, where BLAS is the better choice: small
/// or narrow products, alpha of 0, and processors without AVX2. An element is summed in an order
/// that depends on k only.
bool gemm_tiled(GemmShape s, float alpha, const MatrixRef& a, const MatrixRef& b, float beta,
                float* c, int64_t ldc, const float* bias, const BlockDone* done = nullptr);

/// `n` rounded up to whole panels.
constexpr int64_t whole_panels(int64_t n) { return (n + kTilePanel - 1) / kTilePanel * kTilePanel; }
/// Packs a right operand of k x n elements into k · whole_panels(n) for multiply_panels; columns
/// that are missing become zeros.
void pack_panels(float* out, const float* b, int64_t k_stride, int64_t column_stride, int64_t k,
                 int64_t n);
/// C = alpha · A @ B + beta · C on the calling thread. A has dense rows (a_k is 1) or dense columns
/// (a_row is 1); B is rows k0 to k0 + k of `panels`, which were packed with `depth` rows. Whole
/// panels of C are written.
void multiply_panels(GemmShape s, float alpha, const float* a, int64_t a_row, int64_t a_k,
                     const float* panels, int64_t depth, int64_t k0, float beta, float* c,
                     int64_t ldc);

}  // namespace vt::cpu::VT_ISA
