// GEMM over OpenBLAS, run on one thread a call: the blocks of C are spread over our own pool, so
// the two libraries' threads never compete. Larger float products take gemm_tiles.h instead.
#include "cpu/kernels/gemm.h"

#include <cblas.h>

#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm_tiles.h"

namespace vt::cpu::VT_ISA {
namespace {

/// A kernel library that is loaded switches BLAS to the calling thread.
const bool single_threaded = [] {
  scipy_openblas_set_num_threads(1);
  return true;
}();

/// An operand as BLAS wants it.
template <class T>
struct BlasOperand {
  const T* data;
  int64_t ld;
  bool transpose;
};

template <class T>
BlasOperand<T> prepare(const MatrixRef& x, int64_t rows, int64_t cols, DType dtype, Scratch use) {
  const T* data = static_cast<const T*>(x.data);
  const bool typed = dtype == DTypeOf<T>::value;
  if (typed && (x.col_stride == 1 || cols == 1) && (x.row_stride >= cols || rows == 1)) {
    if (cols > 1 || rows == 1)
      return {data, rows == 1 ? std::max<int64_t>(cols, 1) : x.row_stride, false};
    return {data, x.row_stride, false};
  }
  if (typed && (x.row_stride == 1 || rows == 1) && (x.col_stride >= rows || cols == 1)) {
    return {data, cols == 1 ? std::max<int64_t>(rows, 1) : x.col_stride, true};
  }
  // Copied or widened into scratch, along whichever dimension is dense.
  T* copy = scratch<T>(use, rows * cols);
  const int64_t size = item_size(dtype);
  const char* base = static_cast<const char*>(x.data);
  const bool by_column = x.row_stride == 1 && x.col_stride != 1;
  const int64_t outer = by_column ? cols : rows, inner = by_column ? rows : cols;
  const int64_t outer_stride = by_column ? x.col_stride : x.row_stride;
  const int64_t inner_stride = by_column ? x.row_stride : x.col_stride;
  for (int64_t i = 0; i < outer; ++i) {
    load_block<T>(copy + i * inner, base + i * outer_stride * size, inner_stride * size, inner,
                  dtype, DTypeOf<T>::value);
  }
  return {copy, std::max<int64_t>(inner, 1), by_column};
}

template <class T>
void fill_rows(T* c, int64_t ldc, int64_t m, int64_t n, const T* bias) {
  for (int64_t i = 0; i < m; ++i) std::copy(bias, bias + n, c + i * ldc);
}

template <class T>
void gemm_float(DType dtype, GemmShape s, double alpha, MatrixRef a, MatrixRef b, double beta,
                void* c, int64_t ldc, const void* bias) {
  const bool typed = dtype == DTypeOf<T>::value;
  const int64_t size = item_size(dtype);
  T* out = static_cast<T*>(c);
  int64_t out_ld = ldc;
  if (!typed) {
    out = scratch<T>(Scratch::GemmC, s.m * s.n);
    out_ld = s.n;
    if (beta != 0) {
      for (int64_t i = 0; i < s.m; ++i) {
        load_block<T>(out + i * s.n, static_cast<const char*>(c) + i * ldc * size, size, s.n, dtype,
                      DTypeOf<T>::value);
      }
    }
  }
  if (bias) {
    T* wide = typed ? nullptr : scratch<T>(Scratch::GemmA, s.n);
    fill_rows(out, out_ld, s.m, s.n, load_row<T>(bias, dtype, 0, s.n, wide));
    beta = 1;
  }
  if (s.k == 0) {
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j)
        out[i * out_ld + j] = beta == 0 ? T(0) : out[i * out_ld + j] * static_cast<T>(beta);
    }
  } else {
    const auto left = prepare<T>(a, s.m, s.k, dtype, Scratch::GemmA);
    const auto right = prepare<T>(b, s.k, s.n, dtype, Scratch::GemmB);
    blas_gemm(left.transpose, right.transpose, s, static_cast<T>(alpha), left.data, left.ld,
              right.data, right.ld, static_cast<T>(beta), out, out_ld);
  }
  if (typed) return;
  for (int64_t i = 0; i < s.m; ++i) {
    store_block<T>(static_cast<char*>(c) + i * ldc * size, size, out + i * s.n, s.n, dtype);
  }
}

template <class T>
void gemm_integer(GemmShape s, T alpha, MatrixRef a, MatrixRef b, T beta, T* c, int64_t ldc,
                  const T* bias) {
  using U = std::make_unsigned_t<T>;  // wraps around as torch's integers do
  U* row = scratch<U>(Scratch::GemmC, s.n);
  const T* left = static_cast<const T*>(a.data);
  const T* right = static_cast<const T*>(b.data);
  for (int64_t i = 0; i < s.m; ++i) {
    std::fill(row, row + s.n, U(0));
    for (int64_t k = 0; k < s.k; ++k) {
      const U x = static_cast<U>(left[i * a.row_stride + k * a.col_stride]);
      const T* y = right + k * b.row_stride;
      if (b.col_stride == 1) {
        for (int64_t j = 0; j < s.n; ++j)
          row[j] = static_cast<U>(row[j] + x * static_cast<U>(y[j]));
      } else {
        for (int64_t j = 0; j < s.n; ++j)
          row[j] = static_cast<U>(row[j] + x * static_cast<U>(y[j * b.col_stride]));
      }
    }
    T* out = c + i * ldc;
    for (int64_t j = 0; j < s.n; ++j) {
      U base = bias ? static_cast<U>(bias[j]) : U(0);
      if (beta != 0) base = static_cast<U>(base + static_cast<U>(beta) * static_cast<U>(out[j]));
      out[j] = static_cast<T>(base + static_cast<U>(alpha) * row[j]);
    }
  }
}

const void* offset(const void* p, int64_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * item_size(dtype);
}
void* offset(void* p, int64_t elements, DType dtype) {
  return static_cast<char*>(p) + elements * item_size(dtype);
}

constexpr double kBlockFlops = 12e6;  // below this a block is not worth handing to a thread

}  // namespace

void blas_gemm(bool ta, bool tb, GemmShape s, float alpha, const float* a, int64_t lda,
               const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  scipy_cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                    s.m, s.n, s.k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void blas_gemm(bool ta, bool tb, GemmShape s, double alpha, const double* a, int64_t lda,
               const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  scipy_cblas_dgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                    s.m, s.n, s.k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_serial(DType dtype, GemmShape s, double alpha, MatrixRef a, MatrixRef b, double beta,
                 void* c, int64_t ldc, const void* bias) {
  if (s.m == 0 || s.n == 0) return;
  ldc = std::max<int64_t>(ldc, s.n);
  if (is_floating(dtype)) {
    if (dtype == DType::Float64)
      return gemm_float<double>(dtype, s, alpha, a, b, beta, c, ldc, bias);
    return gemm_float<float>(dtype, s, alpha, a, b, beta, c, ldc, bias);
  }
  visit_integral(dtype, [&]<class T>() {
    gemm_integer<T>(s, static_cast<T>(static_cast<int64_t>(alpha)), a, b,
                    static_cast<T>(static_cast<int64_t>(beta)), static_cast<T*>(c), ldc,
                    static_cast<const T*>(bias));
  });
}

void gemm(DType dtype, GemmShape s, double alpha, MatrixRef a, MatrixRef b, double beta, void* c,
          int64_t ldc, const void* bias, const BlockDone* done) {
  if (dtype == DType::Float32 &&
      gemm_tiled(s, static_cast<float>(alpha), a, b, static_cast<float>(beta),
                 static_cast<float*>(c), std::max(ldc, s.n), static_cast<const float*>(bias), done))
    return;
  const double flops = 2.0 * static_cast<double>(s.m) * static_cast<double>(s.n) *
                       static_cast<double>(std::max<int64_t>(s.k, 1));
  const double per_block = is_floating(dtype) ? kBlockFlops : 1e6;
  // One block a thread: every block packs the shared operand anew. An element's sum runs over k in
  // the same order wherever its block begins, so this does not show in the result.
  const int64_t want =
      std::clamp<int64_t>(static_cast<int64_t>(flops / per_block), 1, num_threads());
  const bool by_rows = s.m >= s.n;
  const int64_t extent = by_rows ? s.m : s.n;
  const int64_t block = std::max<int64_t>(((extent + want - 1) / want + 15) / 16 * 16, 16);
  const int64_t blocks = (extent + block - 1) / block;
  if (blocks <= 1) {
    gemm_serial(dtype, s, alpha, a, b, beta, c, ldc, bias);
    if (done && s.m > 0 && s.n > 0) (*done)({0, 0, s.m, s.n});
    return;
  }
  ldc = std::max<int64_t>(ldc, s.n);
  parallel_chunks(blocks, [&](int64_t i) {
    const int64_t first = i * block, count = std::min(block, extent - first);
    if (by_rows) {
      gemm_serial(dtype, {count, s.n, s.k}, alpha,
                  {offset(a.data, first * a.row_stride, dtype), a.row_stride, a.col_stride}, b,
                  beta, offset(c, first * ldc, dtype), ldc, bias);
      if (done) (*done)({first, 0, count, s.n});
    } else {
      gemm_serial(dtype, {s.m, count, s.k}, alpha, a,
                  {offset(b.data, first * b.col_stride, dtype), b.row_stride, b.col_stride}, beta,
                  offset(c, first, dtype), ldc, bias ? offset(bias, first, dtype) : nullptr);
      if (done) (*done)({0, first, s.m, count});
    }
  });
}

void gemm_batched(DType dtype, int64_t batch, GemmShape s, double alpha, MatrixRef a,
                  int64_t a_step, MatrixRef b, int64_t b_step, double beta, void* c, int64_t c_step,
                  int64_t ldc) {
  const auto one = [&](int64_t i, auto product) {
    product(dtype, s, alpha,
            MatrixRef{offset(a.data, i * a_step, dtype), a.row_stride, a.col_stride},
            MatrixRef{offset(b.data, i * b_step, dtype), b.row_stride, b.col_stride}, beta,
            offset(c, i * c_step, dtype), ldc, nullptr);
  };
  const double flops = 2.0 * static_cast<double>(s.m) * static_cast<double>(s.n) *
                       static_cast<double>(std::max<int64_t>(s.k, 1));
  if (flops > 2 * kBlockFlops && batch < 16) {
    const auto spread = [](auto... args) { gemm(args...); };
    for (int64_t i = 0; i < batch; ++i) one(i, spread);
    return;
  }
  parallel_for(0, batch, std::max<int64_t>(1, static_cast<int64_t>(1e6 / flops)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) one(i, gemm_serial);
               });
}

}  // namespace vt::cpu::VT_ISA
