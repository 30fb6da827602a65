// softmax and log_softmax, forward and backward, along any dimension.
// Rows are reduced whole (two reads and one write while the row is in cache); for an inner
// dimension, columns are processed side by side in strips that fit L1.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kStrip = 128;

struct Split {
  int64_t outer = 1, n = 1, inner = 1;
};
Split split_at(const Tensor& t, int64_t dim) {
  Split s;
  if (t.dim() == 0) return s;
  const int64_t d = wrap_dim(dim, t.dim());
  for (int64_t i = 0; i < d; ++i) s.outer *= t.sizes()[i];
  s.n = t.sizes()[d];
  for (int64_t i = d + 1; i < t.dim(); ++i) s.inner *= t.sizes()[i];
  return s;
}

template <class T, bool kLog>
void forward_row(T* y, const T* x, int64_t n) {
  const T top = row_max(x, n);
  if constexpr (kLog) {
    const T lse = top + std::log(row_exp_sum(x, top, n));
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] - lse;
  } else {
    const T total = row_exp(y, x, T(1), top, n);
    const T scale = T(1) / total;
    for (int64_t i = 0; i < n; ++i) y[i] *= scale;
  }
}

template <class T, bool kLog>
void backward_row(T* gx, const T* g, const T* y, int64_t n) {
  if constexpr (kLog) {
    const T total = row_sum(g, n);
    for (int64_t i = 0; i < n; ++i) gx[i] = g[i] - exp_nonpositive(y[i]) * total;
  } else {
    const T total = row_dot(g, y, n);
    for (int64_t i = 0; i < n; ++i) gx[i] = (g[i] - total) * y[i];
  }
}

template <class T, bool kLog>
void forward_strip(T* y, const T* x, int64_t n, int64_t inner, int64_t width) {
  T top[kStrip], total[kStrip];
  std::fill(top, top + width, -std::numeric_limits<T>::infinity());
  std::fill(total, total + width, T(0));
  for (int64_t i = 0; i < n; ++i) {
    const T* row = x + i * inner;
    for (int64_t j = 0; j < width; ++j)
      top[j] = row[j] > top[j] || row[j] != row[j] ? row[j] : top[j];
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* row = x + i * inner;
    T* out = y + i * inner;
    for (int64_t j = 0; j < width; ++j) {
      out[j] = exp_nonpositive(row[j] - top[j]);
      total[j] += out[j];
    }
  }
  for (int64_t j = 0; j < width; ++j)
    total[j] = kLog ? top[j] + std::log(total[j]) : T(1) / total[j];
  for (int64_t i = 0; i < n; ++i) {
    const T* row = x + i * inner;
    T* out = y + i * inner;
    for (int64_t j = 0; j < width; ++j) out[j] = kLog ? row[j] - total[j] : out[j] * total[j];
  }
}

template <class T, bool kLog>
void backward_strip(T* gx, const T* g, const T* y, int64_t n, int64_t inner, int64_t width) {
  T total[kStrip];
  std::fill(total, total + width, T(0));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; ++j)
      total[j] += kLog ? g[i * inner + j] : g[i * inner + j] * y[i * inner + j];
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = i * inner + j;
      gx[at] = kLog ? g[at] - exp_nonpositive(y[at]) * total[j] : (g[at] - total[j]) * y[at];
    }
  }
}

/// Calls strip(offset, width) for every strip of columns of every outer index.
template <class F>
void for_each_strip(const Split& s, const F& strip) {
  const int64_t strips = (s.inner + kStrip - 1) / kStrip;
  parallel_for(0, s.outer * strips, row_grain(s.n * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % strips * kStrip;
      strip(i / strips * s.n * s.inner + first, std::min(kStrip, s.inner - first));
    }
  });
}

template <bool kLog>
void forward(const Tensor& out, const Tensor& self, int64_t dim) {
  const Split s = split_at(self, dim);
  if (self.numel() == 0) return;
  const DType compute = out.dtype() == DType::Float64 || self.dtype() == DType::Float64
                            ? DType::Float64
                            : DType::Float32;
  visit_float(compute, [&]<class T>() {
    if (s.inner > 1) {
      const Tensor x = dense_as(self, compute);
      const Tensor y = out.dtype() == compute ? out : empty(out.sizes(), compute);
      for_each_strip(s, [&](int64_t at, int64_t width) {
        forward_strip<T, kLog>(y.data_as<T>() + at, x.data_as<T>() + at, s.n, s.inner, width);
      });
      if (!y.is_same(out)) kernels_for(DeviceType::CPU).copy_(out, y, false);
      return;
    }
    const Tensor x = dense(self);
    parallel_for(0, s.outer, row_grain(s.n), [&](int64_t begin, int64_t end) {
      T* in_row = x.dtype() == compute ? nullptr : scratch<T>(Scratch::Row0, s.n);
      T* out_row = out.dtype() == compute ? nullptr : scratch<T>(Scratch::Row1, s.n);
      for (int64_t i = begin; i < end; ++i) {
        T* y = row_target<T>(out.data(), out.dtype(), i * s.n, out_row);
        forward_row<T, kLog>(y, load_row<T>(x.data(), x.dtype(), i * s.n, s.n, in_row), s.n);
        store_row<T>(out.data(), out.dtype(), i * s.n, s.n, y);
      }
    });
  });
}

template <bool kLog>
void backward(const Tensor& out, const Tensor& grad, const Tensor& output, int64_t dim) {
  const Split s = split_at(output, dim);
  if (output.numel() == 0) return;
  const DType compute = output.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  visit_float(compute, [&]<class T>() {
    if (s.inner > 1) {
      const Tensor g = dense_as(grad, compute), y = dense_as(output, compute);
      const Tensor gx = out.dtype() == compute ? out : empty(out.sizes(), compute);
      for_each_strip(s, [&](int64_t at, int64_t width) {
        backward_strip<T, kLog>(gx.data_as<T>() + at, g.data_as<T>() + at, y.data_as<T>() + at, s.n,
                                s.inner, width);
      });
      if (!gx.is_same(out)) kernels_for(DeviceType::CPU).copy_(out, gx, false);
      return;
    }
    const Tensor g = dense(grad), y = dense(output);
    parallel_for(0, s.outer, row_grain(s.n), [&](int64_t begin, int64_t end) {
      T* g_row = g.dtype() == compute ? nullptr : scratch<T>(Scratch::Row0, s.n);
      T* y_row = y.dtype() == compute ? nullptr : scratch<T>(Scratch::Row1, s.n);
      T* out_row = out.dtype() == compute ? nullptr : scratch<T>(Scratch::Row2, s.n);
      for (int64_t i = begin; i < end; ++i) {
        T* gx = row_target<T>(out.data(), out.dtype(), i * s.n, out_row);
        backward_row<T, kLog>(gx, load_row<T>(g.data(), g.dtype(), i * s.n, s.n, g_row),
                              load_row<T>(y.data(), y.dtype(), i * s.n, s.n, y_row), s.n);
        store_row<T>(out.data(), out.dtype(), i * s.n, s.n, gx);
      }
    });
  });
}

const RegisterCpu register_softmax([](KernelTable& t) {
  t.softmax = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    forward<false>(out, self, dim);
  };
  t.log_softmax = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    forward<true>(out, self, dim);
  };
  t._softmax_backward = [](const Tensor& out, const Tensor& grad, const Tensor& output, int64_t dim,
                           DType) { backward<false>(out, grad, output, dim); };
  t._log_softmax_backward = [](const Tensor& out, const Tensor& grad, const Tensor& output,
                               int64_t dim, DType) { backward<true>(out, grad, output, dim); };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
