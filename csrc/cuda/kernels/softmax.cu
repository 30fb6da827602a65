// softmax and log_softmax, forward and backward, along any dimension. Rows (the last dimension) up
// to 16K elements are read once and kept in registers; longer ones are read twice, the first time
// for a running maximum and sum. Along an inner dimension, a block takes 32 neighbouring columns
// and splits their length over its warps.
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/rows.cuh"

namespace vt::cuda {
namespace {

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

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    softmax_cached(S* out, const S* in, int64_t rows, int n, bool log) {
  using T = Compute<S>;
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const S* x = in + row * n;
    S* y = out + row * n;
    T value[kPieces][W];
    T top = minus_infinity<T>();
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
      load_piece<S, T, W>(x + c * step + first, value[c]);
    }
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) top = Larger()(top, value[c][k]);
    }
    top = row_reduce(top, Larger(), shared);
    T total = T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const T e = exp_of(value[c][k] - top);
        total += e;
        if (!log) value[c][k] = e;
      }
    }
    total = row_reduce(total, Plus(), shared);
    const T scale = T(1) / total, lse = log ? top + log_of(total) : T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) value[c][k] = log ? value[c][k] - lse : value[c][k] * scale;
      store_piece<S, T, W>(y + c * step + first, value[c]);
    }
  }
}

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    softmax_long(S* out, const S* in, int64_t rows, int64_t n, bool log) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const S* x = in + row * n;
    S* y = out + row * n;
    OnlineSum<T> sum;
    for_each_piece<W>(x, n, [&](auto width, int64_t i) {
      T value[width];
      load_piece<S, T, width>(x + i, value);
      sum.add(value);
    });
    sum.reduce(shared);
    const T scale = T(1) / sum.total, lse = sum.top + log_of(sum.total);
    for_each_piece<W>(x, n, [&](auto width, int64_t i) {
      T value[width];
      load_piece<S, T, width>(x + i, value);
#pragma unroll
      for (int k = 0; k < width; ++k)
        value[k] = log ? value[k] - lse : exp_of(value[k] - sum.top) * scale;
      store_piece<S, T, width>(y + i, value);
    });
  }
}

template <class T>
__device__ inline T gradient(T g, T y, T total, bool log) {
  return log ? g - exp_of(y) * total : (g - total) * y;
}

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    backward_cached(S* out, const S* grad, const S* output, int64_t rows, int n, bool log) {
  using T = Compute<S>;
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    T g[kPieces][W], y[kPieces][W];
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
      load_piece<S, T, W>(grad + row * n + c * step + first, g[c]);
      load_piece<S, T, W>(output + row * n + c * step + first, y[c]);
    }
    T total = T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) total += log ? g[c][k] : g[c][k] * y[c][k];
    }
    total = row_reduce(total, Plus(), shared);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) g[c][k] = gradient(g[c][k], y[c][k], total, log);
      store_piece<S, T, W>(out + row * n + c * step + first, g[c]);
    }
  }
}

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    backward_long(S* out, const S* grad, const S* output, int64_t rows, int64_t n, bool log) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const S* g = grad + row * n;
    const S* y = output + row * n;
    S* gx = out + row * n;
    T total = T(0);
    for_each_piece<W>(g, n, [&](auto width, int64_t i) {
      T a[width], b[width];
      load_piece<S, T, width>(g + i, a);
      if (!log) load_piece<S, T, width>(y + i, b);
#pragma unroll
      for (int k = 0; k < width; ++k) total += log ? a[k] : a[k] * b[k];
    });
    total = row_reduce(total, Plus(), shared);
    for_each_piece<W>(g, n, [&](auto width, int64_t i) {
      T a[width], b[width];
      load_piece<S, T, width>(g + i, a);
      load_piece<S, T, width>(y + i, b);
#pragma unroll
      for (int k = 0; k < width; ++k) a[k] = gradient(a[k], b[k], total, log);
      store_piece<S, T, width>(gx + i, a);
    });
  }
}

// Columns: threads (32 columns) x (8 parts of their length).
constexpr int kParts = 8;

struct Columns {
  int64_t outer, n, inner, strips;  // strips of 32 columns in an outer index
};

template <class S>
__global__ void __launch_bounds__(kWarp* kParts)
    softmax_columns(S* out, const S* in, Columns p, bool log) {
  using T = Compute<S>;
  __shared__ T tops[kParts][kWarp], totals[kParts][kWarp];
  for (int64_t block = blockIdx.x; block < p.outer * p.strips; block += gridDim.x) {
    const int64_t column = block % p.strips * kWarp + threadIdx.x;
    const int64_t base = block / p.strips * p.n * p.inner + column;
    const bool inside = column < p.inner;
    OnlineSum<T> sum;
    if (inside) {
      for (int64_t i = threadIdx.y; i < p.n; i += kParts) {
        const T value[1] = {convert<T>(in[base + i * p.inner])};
        sum.add(value);
      }
    }
    __syncthreads();
    tops[threadIdx.y][threadIdx.x] = sum.top;
    totals[threadIdx.y][threadIdx.x] = sum.total;
    __syncthreads();
    T top = minus_infinity<T>(), total = T(0);
#pragma unroll
    for (int k = 0; k < kParts; ++k) top = Larger()(top, tops[k][threadIdx.x]);
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      total += totals[k][threadIdx.x] * exp_of(tops[k][threadIdx.x] - OnlineSum<T>::shift(top));
    const T scale = T(1) / total, lse = top + log_of(total);
    if (inside) {
      for (int64_t i = threadIdx.y; i < p.n; i += kParts) {
        const T x = convert<T>(in[base + i * p.inner]);
        out[base + i * p.inner] = convert<S>(log ? x - lse : exp_of(x - top) * scale);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kWarp* kParts)
    backward_columns(S* out, const S* grad, const S* output, Columns p, bool log) {
  using T = Compute<S>;
  __shared__ T totals[kParts][kWarp];
  for (int64_t block = blockIdx.x; block < p.outer * p.strips; block += gridDim.x) {
    const int64_t column = block % p.strips * kWarp + threadIdx.x;
    const int64_t base = block / p.strips * p.n * p.inner + column;
    const bool inside = column < p.inner;
    T part = T(0);
    if (inside) {
      for (int64_t i = threadIdx.y; i < p.n; i += kParts) {
        const T g = convert<T>(grad[base + i * p.inner]);
        part += log ? g : g * convert<T>(output[base + i * p.inner]);
      }
    }
    __syncthreads();
    totals[threadIdx.y][threadIdx.x] = part;
    __syncthreads();
    T total = T(0);
#pragma unroll
    for (int k = 0; k < kParts; ++k) total += totals[k][threadIdx.x];
    if (inside) {
      for (int64_t i = threadIdx.y; i < p.n; i += kParts) {
        const int64_t at = base + i * p.inner;
        out[at] = convert<S>(gradient(convert<T>(grad[at]), convert<T>(output[at]), total, log));
      }
    }
  }
}

struct ColumnLaunch {
  Columns columns;
  dim3 grid, block{kWarp, kParts};
  explicit ColumnLaunch(const Split& s)
      : columns{s.outer, s.n, s.inner, ceil_div<int64_t>(s.inner, kWarp)},
        grid(static_cast<unsigned>(
            std::min<int64_t>(s.outer * columns.strips, std::numeric_limits<int>::max()))) {}
};

/// The dtype a kernel runs in: the operands' own where they agree, else the compute type of both.
DType kernel_dtype(const Tensor& out, const Tensor& in) {
  if (out.dtype() == in.dtype()) return out.dtype();
  return out.dtype() == DType::Float64 || in.dtype() == DType::Float64 ? DType::Float64
                                                                       : DType::Float32;
}

/// Dense rows through a CuTe kernel; false where none is chosen.
bool forward_by_cute(const Launch& launch, const Tensor& y, const Tensor& x, const Split& s,
                     bool log) {
  if (s.inner != 1 || !cute::considered<cute::SoftmaxForward>()) return false;
  cute::SoftmaxForward a;
  a.m = s.outer;
  a.n = s.n;
  a.x = {x.data(), x.dtype(), s.n};
  a.y = {y.data(), y.dtype(), s.n};
  a.logarithm = log;
  return cute::launch(a, launch);
}
bool backward_by_cute(const Launch& launch, const Tensor& gx, const Tensor& g, const Tensor& y,
                      const Split& s, bool log) {
  if (s.inner != 1 || !cute::considered<cute::SoftmaxBackward>()) return false;
  cute::SoftmaxBackward a;
  a.m = s.outer;
  a.n = s.n;
  a.dy = {g.data(), g.dtype(), s.n};
  a.y = {y.data(), y.dtype(), s.n};
  a.dx = {gx.data(), gx.dtype(), s.n};
  a.logarithm = log;
  return cute::launch(a, launch);
}

void forward(const Tensor& out, const Tensor& self, int64_t dim, bool log) {
  if (self.numel() == 0) return;
  const Split s = split_at(self, dim);
  const DType dtype = kernel_dtype(out, self);
  const Launch launch(self.device());
  const Tensor x = dense_as(self, dtype);
  const Tensor y = out.dtype() == dtype ? out : empty(out.sizes(), dtype, out.device());
  const bool done = forward_by_cute(launch, y, x, s, log);
  visit_float_storage(dtype, [&]<class S>() {
    if (done) return;
    using T = Compute<S>;
    constexpr int W = kWidthOf<S>;
    S* to = y.data_as<S>();
    const S* from = x.data_as<S>();
    if (s.inner > 1) {
      const ColumnLaunch shape(s);
      launch(softmax_columns<S>, shape.grid, shape.block, 0, to, from, shape.columns, log);
      return;
    }
    const RowLaunch shape(s.outer, s.n, kRowItems<T>);
    const bool together = is_aligned(from) && is_aligned(to);
    if (s.n <= kCachedRow<T>) {
      launch(together && s.n % W == 0 ? softmax_cached<S, W> : softmax_cached<S, 1>, shape.grid,
             shape.block, 0, to, from, s.outer, static_cast<int>(s.n), log);
    } else {
      launch(together ? softmax_long<S, W> : softmax_long<S, 1>, shape.grid, shape.block, 0, to,
             from, s.outer, s.n, log);
    }
  });
  if (!y.is_same(out)) copy(out, y, true);
}

void backward(const Tensor& out, const Tensor& grad, const Tensor& output, int64_t dim, bool log) {
  if (output.numel() == 0) return;
  const Split s = split_at(output, dim);
  const DType dtype = grad.dtype() == output.dtype() ? kernel_dtype(out, output)
                                                     : statistics_dtype(output.dtype());
  const Launch launch(output.device());
  const Tensor g = dense_as(grad, dtype), y = dense_as(output, dtype);
  const Tensor gx = out.dtype() == dtype ? out : empty(out.sizes(), dtype, out.device());
  const bool done = backward_by_cute(launch, gx, g, y, s, log);
  visit_float_storage(dtype, [&]<class S>() {
    if (done) return;
    using T = Compute<S>;
    constexpr int W = kWidthOf<S>;
    S* to = gx.data_as<S>();
    const S* gs = g.data_as<S>();
    const S* ys = y.data_as<S>();
    if (s.inner > 1) {
      const ColumnLaunch shape(s);
      launch(backward_columns<S>, shape.grid, shape.block, 0, to, gs, ys, shape.columns, log);
      return;
    }
    const RowLaunch shape(s.outer, s.n, kRowItems<T>);
    const bool together = is_aligned(gs) && is_aligned(ys) && is_aligned(to);
    if (s.n <= kCachedRow<T>) {
      launch(together && s.n % W == 0 ? backward_cached<S, W> : backward_cached<S, 1>, shape.grid,
             shape.block, 0, to, gs, ys, s.outer, static_cast<int>(s.n), log);
    } else {
      launch(together ? backward_long<S, W> : backward_long<S, 1>, shape.grid, shape.block, 0, to,
             gs, ys, s.outer, s.n, log);
    }
  });
  if (!gx.is_same(out)) copy(out, gx, true);
}

const RegisterCuda registered([](KernelTable& t) {
  t.softmax = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    forward(out, self, dim, false);
  };
  t.log_softmax = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    forward(out, self, dim, true);
  };
  t._softmax_backward = [](const Tensor& out, const Tensor& grad, const Tensor& output, int64_t dim,
                           DType) { backward(out, grad, output, dim, false); };
  t._log_softmax_backward = [](const Tensor& out, const Tensor& grad, const Tensor& output,
                               int64_t dim, DType) { backward(out, grad, output, dim, true); };
});

}  // namespace
}  // namespace vt::cuda
