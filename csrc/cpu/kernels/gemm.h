// Matrix products. C = alpha · A @ B + beta · C with any strides on A and B and dense rows in C.
#pragma once

#include <functional>

#include "core/dtype.h"

namespace vt::cpu::VT_ISA {

/// One operand: element (i, j) is at data + i·row_stride + j·col_stride elements.
struct MatrixRef {
  const void* data;
  int64_t row_stride, col_stride;
};

struct GemmShape {
  int64_t m, n, k;
};

/// A block of C.
struct Block {
  int64_t row, column, rows, columns;
};
/// Called with each block of C once it is complete, by the thread that computed it and while it is
/// in its cache; the blocks cover C.
using BlockDone = std::function<void(const Block&)>;

/// On the calling thread. `bias`: null, or n dense values added to every row (then beta is 0).
/// Float operands that BLAS can address are read in place; 16-bit floats are widened block by
/// block, accumulated in float and rounded once.
void gemm_serial(DType dtype, GemmShape s, double alpha, MatrixRef a, MatrixRef b, double beta,
                 void* c, int64_t ldc, const void* bias = nullptr);
/// The same, with C cut into blocks for the thread pool; the cut follows from the shape only.
void gemm(DType dtype, GemmShape s, double alpha, MatrixRef a, MatrixRef b, double beta, void* c,
          int64_t ldc, const void* bias = nullptr, const BlockDone* done = nullptr);
/// `batch` products at the given distances (elements; 0 repeats an operand).
void gemm_batched(DType dtype, int64_t batch, GemmShape s, double alpha, MatrixRef a,
                  int64_t a_step, MatrixRef b, int64_t b_step, double beta, void* c, int64_t c_step,
                  int64_t ldc);

/// BLAS on float or double with unit stride in one of each operand's dimensions: transposed
/// operands as stored have the roles of rows and columns exchanged. No checks, one thread.
void blas_gemm(bool transpose_a, bool transpose_b, GemmShape s, float alpha, const float* a,
               int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void blas_gemm(bool transpose_a, bool transpose_b, GemmShape s, double alpha, const double* a,
               int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc);

}  // namespace vt::cpu::VT_ISA
