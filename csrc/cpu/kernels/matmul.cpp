// Kernels of mm, bmm, addmm, baddbmm, mv, addmv, dot and linear: they read the operands' strides
// and hand the product to gemm.h.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

MatrixRef matrix(const Tensor& t) {
  const int64_t n = t.dim();
  return {t.data(), t.strides()[n - 2], t.strides()[n - 1]};
}

void mm_kernel(const Tensor& out, const Tensor& self, const Tensor& mat2) {
  gemm(self.dtype(), {self.sizes()[0], mat2.sizes()[1], self.sizes()[1]}, 1, matrix(self),
       matrix(mat2), 0, out.data(), out.strides()[0]);
}

/// int8 products summed in 32 bits, which wrap: a row of the result gathers multiples of mat2's
/// rows.
void int_mm_kernel(const Tensor& out, const Tensor& self, const Tensor& mat2) {
  const int64_t m = self.sizes()[0], k = self.sizes()[1], n = mat2.sizes()[1];
  const Tensor left = dense(self), right = dense(mat2);
  const auto* a = left.data_as<int8_t>();
  const auto* b = right.data_as<int8_t>();
  auto* c = reinterpret_cast<uint32_t*>(out.data());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k * n));
  parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t* sums = c + i * n;
      std::fill_n(sums, n, 0u);
      for (int64_t p = 0; p < k; ++p) {
        const int32_t x = a[i * k + p];
        const int8_t* row = b + p * n;
        for (int64_t j = 0; j < n; ++j) sums[j] += static_cast<uint32_t>(x * row[j]);
      }
    }
  });
}

void bmm_kernel(const Tensor& out, const Tensor& self, const Tensor& mat2) {
  const GemmShape s{self.sizes()[1], mat2.sizes()[2], self.sizes()[2]};
  gemm_batched(self.dtype(), self.sizes()[0], s, 1, matrix(self), self.strides()[0], matrix(mat2),
               mat2.strides()[0], 0, out.data(), out.strides()[0], out.strides()[1]);
}

/// `out` = `self` broadcast to out's shape, unless beta is 0 (then self's NaNs are not read).
void start_with(const Tensor& out, const Tensor& self, const Scalar& beta) {
  if (beta.to_double() == 0) return;
  const int64_t lead = out.dim() - self.dim();
  Dims strides(static_cast<size_t>(out.dim()), 0);
  for (int64_t d = lead; d < out.dim(); ++d) {
    if (self.sizes()[d - lead] != 1) strides[d] = self.strides()[d - lead];
  }
  kernels_for(DeviceType::CPU)
      .copy_(out, make_view(self, out.sizes(), strides, self.storage_offset()), false);
}

void addmm_kernel(const Tensor& out, const Tensor& self, const Tensor& mat1, const Tensor& mat2,
                  const Scalar& beta, const Scalar& alpha) {
  start_with(out, self, beta);
  gemm(mat1.dtype(), {mat1.sizes()[0], mat2.sizes()[1], mat1.sizes()[1]}, alpha.to_double(),
       matrix(mat1), matrix(mat2), beta.to_double(), out.data(), out.strides()[0]);
}

void baddbmm_kernel(const Tensor& out, const Tensor& self, const Tensor& batch1,
                    const Tensor& batch2, const Scalar& beta, const Scalar& alpha) {
  start_with(out, self, beta);
  const GemmShape s{batch1.sizes()[1], batch2.sizes()[2], batch1.sizes()[2]};
  gemm_batched(batch1.dtype(), batch1.sizes()[0], s, alpha.to_double(), matrix(batch1),
               batch1.strides()[0], matrix(batch2), batch2.strides()[0], beta.to_double(),
               out.data(), out.strides()[0], out.strides()[1]);
}

void mv_kernel(const Tensor& out, const Tensor& self, const Tensor& vec) {
  gemm(self.dtype(), {self.sizes()[0], 1, self.sizes()[1]}, 1, matrix(self),
       {vec.data(), vec.strides()[0], 1}, 0, out.data(), 1);
}

void addmv_kernel(const Tensor& out, const Tensor& self, const Tensor& mat, const Tensor& vec,
                  const Scalar& beta, const Scalar& alpha) {
  start_with(out, self, beta);
  gemm(mat.dtype(), {mat.sizes()[0], 1, mat.sizes()[1]}, alpha.to_double(), matrix(mat),
       {vec.data(), vec.strides()[0], 1}, beta.to_double(), out.data(), 1);
}

void dot_kernel(const Tensor& out, const Tensor& self, const Tensor& other) {
  const int64_t n = self.numel();
  if (!is_floating(self.dtype())) {
    gemm_serial(self.dtype(), {1, 1, n}, 1, {self.data(), 1, self.strides()[0]},
                {other.data(), other.strides()[0], 1}, 0, out.data(), 1);
    return;
  }
  visit_float(self.dtype(), [&]<class T>() {
    constexpr int64_t kPart = 4096;
    T a[kPart], b[kPart];
    double total = 0;
    for (int64_t i = 0; i < n; i += kPart) {
      const int64_t m = std::min(kPart, n - i);
      const int64_t size = self.itemsize();
      load_block<T>(a, static_cast<const char*>(self.data()) + i * self.strides()[0] * size,
                    self.strides()[0] * size, m, self.dtype(), DTypeOf<T>::value);
      load_block<T>(b, static_cast<const char*>(other.data()) + i * other.strides()[0] * size,
                    other.strides()[0] * size, m, other.dtype(), DTypeOf<T>::value);
      total += static_cast<double>(row_dot(a, b, m));
    }
    const T result = static_cast<T>(total);
    store_block<T>(static_cast<char*>(out.data()), out.itemsize(), &result, 1, out.dtype());
  });
}

/// Whether all dimensions but the last can be walked with one stride; sets it.
bool rows_of(const Tensor& t, int64_t& row_stride) {
  const int64_t n = t.dim();
  row_stride = 0;
  int64_t expected = -1;
  for (int64_t d = n - 2; d >= 0; --d) {
    if (t.sizes()[d] == 1) continue;
    if (expected < 0) {
      row_stride = t.strides()[d];
    } else if (t.strides()[d] != expected) {
      return false;
    }
    expected = t.strides()[d] * t.sizes()[d];
  }
  return true;
}

void linear_kernel(const Tensor& out, const Tensor& input, const Tensor& weight,
                   const Tensor& bias) {
  const int64_t k = weight.sizes()[1], n = weight.sizes()[0];
  if (out.numel() == 0) return;
  int64_t row_stride = 0;
  Tensor x = input;
  if (!rows_of(x, row_stride)) {
    x = dense(x);
    rows_of(x, row_stride);
  }
  const Tensor added = dense(bias);
  gemm(x.dtype(), {out.numel() / n, n, k}, 1, {x.data(), row_stride, x.strides()[x.dim() - 1]},
       {weight.data(), weight.strides()[1], weight.strides()[0]}, 0, out.data(), n,
       added.defined() ? added.data() : nullptr);
}

const RegisterCpu register_matmul([](KernelTable& t) {
  t.mm = mm_kernel;
  t._int_mm = int_mm_kernel;
  t.bmm = bmm_kernel;
  t.addmm = addmm_kernel;
  t.baddbmm = baddbmm_kernel;
  t.mv = mv_kernel;
  t.addmv = addmv_kernel;
  t.dot = dot_kernel;
  t.linear = linear_kernel;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
