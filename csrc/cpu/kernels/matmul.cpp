// Kernels of mm, bmm, addmm, baddbmm, mv, addmv, dot and linear: they read the operands' strides
// and hand the product to gemm.h. Fused forms finish the blocks of a product while they are in the
// cache.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/row_math.h"
#include "cpu/kernels/vec_math.h"

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

/// `out` = `self` broadcast to out's shape, unless beta is 0 (then self's NaNs are not read) or it
/// is out's own memory.
void start_with(const Tensor& out, const Tensor& self, const Scalar& beta) {
  if (beta.to_double() == 0) return;
  const auto same = [](IntSpan a, IntSpan b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  if (self.data() == out.data() && same(self.sizes(), out.sizes()) &&
      same(self.strides(), out.strides()))
    return;
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

/// `done`: see gemm.h; of a matrix of out's rows.
void linear_product(const Tensor& out, const Tensor& input, const Tensor& weight,
                    const Tensor& bias, const BlockDone* done) {
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
       added.defined() ? added.data() : nullptr, done);
}

void linear_kernel(const Tensor& out, const Tensor& input, const Tensor& weight,
                   const Tensor& bias) {
  linear_product(out, input, weight, bias, nullptr);
}

/// Calls f(function) with the activation of this name, or with `slope` with g times its derivative.
template <bool slope, class F>
void visit_activation(std::string_view name, const F& f) {
  if constexpr (slope) {
    if (name == "relu") return f([](auto g, auto y) { return y <= 0 ? decltype(g)(0) : g; });
    if (name == "silu") return f([](auto g, auto x) { return g * vsilu_grad(x); });
    if (name == "gelu") return f([](auto g, auto x) { return g * vgelu_grad(x); });
    return f([](auto g, auto x) { return g * vgelu_tanh_grad(x); });
  } else {
    if (name == "relu") return f([](auto x) { return x != x ? x : x > 0 ? x : decltype(x)(0); });
    if (name == "silu") return f([](auto x) { return vsilu(x); });
    if (name == "gelu") return f([](auto x) { return vgelu(x); });
    return f([](auto x) { return vgelu_tanh(x); });
  }
}

/// Calls f(at, n) for the rows of a block of a dense matrix with `width` columns.
template <class F>
void for_each_row(const Block& block, int64_t width, const F& f) {
  for (int64_t i = block.row; i < block.row + block.rows; ++i)
    f(i * width + block.column, block.columns);
}

/// out = f(in) in a block of dense matrices, f of numbers of type T.
template <class T, class F>
void activate_block(const Tensor& out, const Tensor& in, const Block& block, const F& f) {
  const DType dtype = out.dtype();
  const bool direct = dtype == DTypeOf<T>::value;
  T* in_row = direct ? nullptr : scratch<T>(Scratch::Row0, block.columns);
  T* out_row = direct ? nullptr : scratch<T>(Scratch::Row1, block.columns);
  for_each_row(block, out.sizes()[out.dim() - 1], [&](int64_t at, int64_t n) {
    const T* x = load_row<T>(in.data(), dtype, at, n, in_row);
    T* y = row_target<T>(out.data(), dtype, at, out_row);
    for (int64_t k = 0; k < n; ++k) y[k] = f(x[k]);
    store_row<T>(out.data(), dtype, at, n, y);
  });
}

/// The activation is applied to blocks of the product that have just been computed.
void linear_activation(const Tensor& out, const Tensor& linear, const Tensor& input,
                       const Tensor& weight, const Tensor& bias, std::string_view activation,
                       bool) {
  const Tensor product = linear.defined() ? linear : out;
  visit_float(out.dtype(), [&]<class T>() {
    visit_activation<false>(activation, [&](auto f) {
      const BlockDone done = [&](const Block& block) { activate_block<T>(out, product, block, f); };
      linear_product(product, input, weight, bias, &done);
    });
  });
}

/// The activation of a dense matrix.
void activate(const Tensor& out, const Tensor& in, std::string_view activation) {
  const int64_t width = out.sizes()[1];
  visit_float(out.dtype(), [&]<class T>() {
    visit_activation<false>(activation, [&](auto f) {
      const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
      parallel_for(0, out.sizes()[0], grain, [&](int64_t begin, int64_t end) {
        activate_block<T>(out, in,
                          {.row = begin, .column = 0, .rows = end - begin, .columns = width}, f);
      });
    });
  });
}

/// The sums are those of sum.dim.
void mm_activation_backward(const Tensor& out, const Tensor& sums, const Tensor& activated,
                            const Tensor& self, const Tensor& mat2, const Tensor& saved,
                            std::string_view activation, bool, bool) {
  const DType dtype = out.dtype();
  const int64_t width = out.sizes()[1];
  const Tensor kept = dense(saved);
  visit_float(dtype, [&]<class T>() {
    visit_activation<true>(activation, [&](auto f) {
      const BlockDone done = [&](const Block& block) {
        T* grad_row =
            dtype == DTypeOf<T>::value ? nullptr : scratch<T>(Scratch::Row0, block.columns);
        T* in_row = dtype == DTypeOf<T>::value ? nullptr : scratch<T>(Scratch::Row1, block.columns);
        for_each_row(block, width, [&](int64_t at, int64_t n) {
          const T* g = load_row<T>(out.data(), dtype, at, n, grad_row);
          const T* x = load_row<T>(kept.data(), dtype, at, n, in_row);
          T* dx = row_target<T>(out.data(), dtype, at, grad_row);
          for (int64_t k = 0; k < n; ++k) dx[k] = f(g[k], x[k]);
          store_row<T>(out.data(), dtype, at, n, dx);
        });
      };
      gemm(dtype, {self.sizes()[0], width, self.sizes()[1]}, 1, matrix(self), matrix(mat2), 0,
           out.data(), out.strides()[0], nullptr, &done);
    });
  });
  if (activated.defined()) activate(activated, kept, activation);
  const int64_t over[] = {0};
  if (sums.defined())
    kernels_for(DeviceType::CPU).sum_dim(sums, out, IntSpan(over), false, std::nullopt);
}

/// The sums are those of sum.dim.
void mm_row_sums(const Tensor& out, const Tensor& sums, const Tensor& self, const Tensor& mat2) {
  mm_kernel(out, self, mat2);
  const int64_t over[] = {1};
  kernels_for(DeviceType::CPU).sum_dim(sums, self, IntSpan(over), false, std::nullopt);
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
  t._linear_activation = linear_activation;
  t._mm_activation_backward = mm_activation_backward;
  t._mm_row_sums = mm_row_sums;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
