// The single-precision product of larger matrices on AVX2 and AVX-512.
#pragma once

#include "cpu/kernels/gemm.h"

namespace vt::cpu::VT_ISA {

/// C = alpha · A @ B + (bias in every row, or beta · C) on the thread pool, for operands of any
/// strides and dense rows in C. False, with nothing done, where BLAS is the better choice: small
/// or narrow products, alpha of 0, and processors without AVX2. An element is summed in an order
/// that depends on k only.
bool gemm_tiled(GemmShape s, float alpha, const MatrixRef& a, const MatrixRef& b, float beta,
                float* c, int64_t ldc, const float* bias);

}  // namespace vt::cpu::VT_ISA
