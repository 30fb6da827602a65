// Matrix products by cuBLASLt. Plans (descriptors and the chosen algorithm) are cached by shape, so
// a repeated product costs one hash lookup before the library's launch.
#pragma once

#include "core/dtype.h"
#include "cuda/stream.h"

namespace vt::cuda {

/// An operand as stored, row-major: element (i, j) at data + i * ld + j elements, or with
/// `transposed` at data + j * ld + i. `step` elements lie between the matrices of a batch.
struct GemmOperand {
  const void* data = nullptr;
  int64_t ld = 0;
  int64_t step = 0;
  bool transposed = false;
};

/// What the library does with a product before it is stored, beside adding a bias. It computes in
/// float from sums that have not been rounded to the dtype.
enum class GemmEpilogue : int32_t {
  None,
  Relu,
  GeluTanh,          // keeps what it is applied to in `aux`
  GeluTanhBackward,  // times the derivative at `aux`
};

/// What a product of 8-bit floats has beside: a is row-major and b transposed, rows of both are
/// multiples of 16 elements, alpha is 1 and beta 0. Needs compute capability 8.9.
struct Float8Operands {
  DType b = DType::Float8_e4m3fn;  // not e5m2 if a is that
  DType c = DType::Float32;        // or a 16-bit float, which a bias then is too
  const float* scale_a = nullptr;  // factors in device memory; null for 1
  const float* scale_b = nullptr;
  bool fast_accumulate = false;  // adds with fewer bits
};

struct GemmProblem {
  DType dtype = DType::Float32;  // a floating dtype; 16-bit ones accumulate in float. Or Int8: then
                                 // c is int32, a row-major, b transposed, alpha 1 and beta 0
  int64_t batch = 1, m = 0, n = 0, k = 0;
  GemmOperand a, b;   // a: m x k, b: k x n
  void* c = nullptr;  // m x n, dense rows `ldc` apart
  int64_t ldc = 0, step_c = 0;
  double alpha = 1, beta = 0;
  const void* bias = nullptr;  // n elements added to every row, or null
  GemmEpilogue epilogue = GemmEpilogue::None;
  void* aux = nullptr;  // m x n like c; its rows, `ldc` apart, must be multiples of 8 elements
  Float8Operands float8 = {};  // where dtype, which is a's, is an 8-bit float
};

/// c = alpha * a @ b + beta * c + bias. False if the library has no algorithm for the problem.
bool cublaslt_gemm(const GemmProblem& problem, Stream stream);

/// The library's version, for `vibetensor info`; loads it.
int64_t cublaslt_version();

}  // namespace vt::cuda
