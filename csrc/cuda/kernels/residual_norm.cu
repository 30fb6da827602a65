// layer_norm and rms_norm together with the residual add beside them. A row stays in registers (up
// to 1024 elements in those of a warp, up to 16K in those of a block) from its first read to its
// last write; longer ones are read again. Operands may be of several floating dtypes: each is widened
// as it is read, and what the plain ops would round between each other is rounded here. Common dtypes
// and lengths are norm_stream_forward.cu's and norm_stream_backward.cu's.
#include "cuda/kernels/column_sums.cuh"
#include "cuda/kernels/norm_stream.cuh"
#include "cuda/kernels/row_moments.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

/// Whether pieces of four floats may be used: all pointers aligned, rows whole pieces.
bool in_pieces(int64_t n, std::initializer_list<Elements> all) {
  bool wide = n % 4 == 0;
  for (const Elements& e : all) wide = wide && is_aligned(e.data) && e.dtype != DType::Float64;
  return wide;
}

template <class T>
struct Forward {
  Elements out, sum, in, residual, weight, bias;
  T eps;
  T* means;  // null: not centred
  T* rstds;
  int64_t rows;
  int64_t residual_rows;  // come again where they are fewer

  __device__ int64_t residual_row(int64_t row) const {
    return residual_rows == rows ? row : row % residual_rows;
  }
};

template <class T, int W>
__global__ void __launch_bounds__(kRowThreads)
    sum_and_norm(const __grid_constant__ Forward<T> p, int n) {
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t start = row * n;
    const int64_t start_added = p.residual.data ? p.residual_row(row) * n : 0;
    T value[kPieces][W];
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      p.in.template load<W>(start + at, value[c]);
      if (!p.residual.data) continue;
      T added[W];
      p.residual.template load<W>(start_added + at, added);
#pragma unroll
      for (int k = 0; k < W; ++k) value[c][k] += added[k];
      p.sum.template round<W>(value[c]);
      p.sum.template store<W>(start + at, value[c]);
    }
    const auto [mean, rstd] = row_moments(value, p.means != nullptr, p.eps, n, shared);
    if (threadIdx.x == 0) {
      if (p.means) p.means[row] = mean;
      p.rstds[row] = rstd;
    }
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      T w[W], b[W];
      p.weight.template load_or<W>(at, w, T(1));
      p.bias.template load_or<W>(at, b, T(0));
#pragma unroll
      for (int k = 0; k < W; ++k) value[c][k] = (value[c][k] - mean) * rstd * w[k] + b[k];
      p.out.template store<W>(start + at, value[c]);
    }
  }
}

/// Rows of any length, one a block: every thread reads again what it wrote itself.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    sum_and_norm_long(const __grid_constant__ Forward<T> p, int64_t n) {
  __shared__ T shared[kRowThreads / kWarp];
  const Elements& source = p.residual.data ? p.sum : p.in;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t start = row * n;
    const int64_t start_added = p.residual.data ? p.residual_row(row) * n : 0;
    T value[1], total = T(0);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      p.in.template load<1>(start + i, value);
      if (p.residual.data) {
        T added[1];
        p.residual.template load<1>(start_added + i, added);
        value[0] += added[0];
        p.sum.template round<1>(value);
        p.sum.template store<1>(start + i, value);
      }
      total += value[0];
    }
    const T mean = p.means ? row_reduce(total, Plus(), shared) / static_cast<T>(n) : T(0);
    T squares = T(0);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      source.template load<1>(start + i, value);
      squares += (value[0] - mean) * (value[0] - mean);
    }
    squares = row_reduce(squares, Plus(), shared) / static_cast<T>(n);
    const T rstd = T(1) / sqrt(squares + p.eps);
    if (threadIdx.x == 0) {
      if (p.means) p.means[row] = mean;
      p.rstds[row] = rstd;
    }
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      T w[1], b[1];
      source.template load<1>(start + i, value);
      p.weight.template load_or<1>(i, w, T(1));
      p.bias.template load_or<1>(i, b, T(0));
      value[0] = (value[0] - mean) * rstd * w[0] + b[0];
      p.out.template store<1>(start + i, value);
    }
  }
}

template <class F>
void visit_statistics(DType dtype, const F& f) {
  if (dtype == DType::Float64)
    f.template operator()<double>();
  else
    f.template operator()<float>();
}

void forward(const Tensor& out, const Tensor& sum, const Tensor* mean, const Tensor& rstd,
             const Tensor& self, const Tensor& residual, int64_t n, const Tensor& weight,
             const Tensor& bias, double eps) {
  if (self.numel() == 0) return;
  const Launch launch(self.device());
  visit_statistics(rstd.dtype(), [&]<class T>() {
    const Tensor x = dense(self), r = dense(residual), w = dense(weight), b = dense(bias);
    // Either of the two may be the wider one, which the sum is like.
    const int64_t rows = self.numel() / n, added_rows = r.defined() ? r.numel() / n : rows;
    const bool second = r.defined() && added_rows == rows && r.dtype() == sum.dtype() &&
                        x.dtype() != sum.dtype();
    if (stream_norm(launch, {.out = out,
                             .sum = sum,
                             .mean = mean ? *mean : Tensor(),
                             .rstd = rstd,
                             .input = second ? r : x,
                             .added = second ? x : r,
                             .weight = w,
                             .bias = b,
                             .eps = eps,
                             .rows = rows,
                             .n = n,
                             .added_rows = added_rows}))
      return;
    const Forward<T> p{Elements(out),
                       Elements(sum),
                       Elements(x),
                       Elements(r),
                       Elements(w),
                       Elements(b),
                       static_cast<T>(eps),
                       mean ? mean->data_as<T>() : nullptr,
                       rstd.data_as<T>(),
                       rows,
                       added_rows};
    const RowLaunch shape(p.rows, n, kRowItems<T>);
    if (n > kCachedRow<T>) {
      launch(sum_and_norm_long<T>, shape.grid, shape.block, 0, p, n);
      return;
    }
    auto* kernel = sum_and_norm<T, 1>;
    if constexpr (sizeof(T) == 4) {
      if (in_pieces(n, {p.out, p.sum, p.in, p.residual, p.weight, p.bias}))
        kernel = sum_and_norm<T, 4>;
    }
    launch(kernel, shape.grid, shape.block, 0, p, static_cast<int>(n));
  });
}

template <class T>
struct Backward {
  Elements total, low, grad, residual, in, weight;
  const T* means;  // null: not centred
  const T* rstds;
  T* partial[2];  // null, or [blocks][n]: a block's sums of dy * xhat, and of dy
  int64_t rows;
  Elements terms[kMostTerms];  // the gradient is grad + terms, each sum rounded to in's dtype

  template <int W>
  __device__ void load_grad(int64_t i, T (&g)[W]) const {
    grad.template load<W>(i, g);
#pragma unroll
    for (const Elements& term : terms) {
      if (!term.data) return;
      T added[W];
      term.template load<W>(i, added);
#pragma unroll
      for (int k = 0; k < W; ++k) g[k] += added[k];
      in.template round<W>(g);
    }
  }
};

/// total = residual + the input's gradient.
template <class T, int W>
__global__ void __launch_bounds__(kRowThreads)
    norm_gradient(const __grid_constant__ Backward<T> p, int n) {
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t start = row * n;
    const T mean = p.means ? p.means[row] : T(0), rstd = p.rstds[row];
    T x[kPieces][W], g[kPieces][W], along = T(0), constant = T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      T w[W];
      p.in.template load<W>(start + at, x[c]);
      p.template load_grad<W>(start + at, g[c]);
      p.weight.template load_or<W>(at, w, T(1));
#pragma unroll
      for (int k = 0; k < W; ++k) {
        x[c][k] -= mean;
        g[c][k] *= w[k];
        along += g[c][k] * x[c][k];
        constant += g[c][k];
      }
    }
    along = row_reduce(along, Plus(), shared);
    constant = p.means ? row_reduce(constant, Plus(), shared) / static_cast<T>(n) : T(0);
    const T slope = along * rstd * rstd / static_cast<T>(n);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) g[c][k] = rstd * (g[c][k] - constant - x[c][k] * slope);
      if (p.residual.data) {
        T added[W];
        p.total.template round<W>(g[c]);
        p.residual.template load<W>(start + at, added);
#pragma unroll
        for (int k = 0; k < W; ++k) g[c][k] += added[k];
      }
      p.total.template store<W>(start + at, g[c]);
      if (p.low.data) {
        p.total.template round<W>(g[c]);
        p.low.template store<W>(start + at, g[c]);
      }
    }
  }
}

/// partial[i] = the sums of rows i, i + gridDim.y, … for rows that belong to blocks.
template <class T>
__global__ void __launch_bounds__(256) column_sums(const __grid_constant__ Backward<T> p, int64_t n) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= n) return;
  T dw = T(0), db = T(0), x[1], g[1];
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    p.in.template load<1>(row * n + column, x);
    p.template load_grad<1>(row * n + column, g);
    dw += g[0] * ((x[0] - (p.means ? p.means[row] : T(0))) * p.rstds[row]);
    db += g[0];
  }
  const int64_t at = int64_t{blockIdx.y} * n + column;
  if (p.partial[0]) p.partial[0][at] = dw;
  if (p.partial[1]) p.partial[1][at] = db;
}

/// Rows longer than a block's registers.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    norm_gradient_long(const __grid_constant__ Backward<T> p, int64_t n) {
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t start = row * n;
    const T mean = p.means ? p.means[row] : T(0), rstd = p.rstds[row];
    T along = T(0), constant = T(0), x[1], g[1], w[1];
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      p.in.template load<1>(start + i, x);
      p.template load_grad<1>(start + i, g);
      p.weight.template load_or<1>(i, w, T(1));
      along += g[0] * w[0] * (x[0] - mean);
      constant += g[0] * w[0];
    }
    along = row_reduce(along, Plus(), shared);
    constant = p.means ? row_reduce(constant, Plus(), shared) / static_cast<T>(n) : T(0);
    const T slope = along * rstd * rstd / static_cast<T>(n);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      p.in.template load<1>(start + i, x);
      p.template load_grad<1>(start + i, g);
      p.weight.template load_or<1>(i, w, T(1));
      T value[1] = {rstd * (g[0] * w[0] - constant - (x[0] - mean) * slope)};
      if (p.residual.data) {
        T added[1];
        p.total.template round<1>(value);
        p.residual.template load<1>(start + i, added);
        value[0] += added[0];
      }
      p.total.template store<1>(start + i, value);
      if (p.low.data) {
        p.total.template round<1>(value);
        p.low.template store<1>(start + i, value);
      }
    }
  }
}

void zero(const Tensor& t, const Launch& launch) {
  if (!t.defined() || t.numel() == 0) return;
  check_cuda(cudaMemsetAsync(t.data(), 0, static_cast<size_t>(t.numel() * t.itemsize()),
                             launch.stream()),
             "filling a gradient with zeros");
}

void backward(const Tensor& total, const Tensor& grad_weight, const Tensor& grad_bias,
              const Tensor& low, const Tensor& row_sums, const Tensor& grad_output,
              const Tensor& residual, const Tensor& input, int64_t n, const Tensor* mean,
              const Tensor& rstd, const Tensor& weight, TensorSpan terms, int64_t parts) {
  check(terms.size() <= kMostTerms, "gradients of a norm: at most ", kMostTerms + 1,
        " terms, got ", terms.size() + 1);
  const Launch launch(input.device());
  if (input.numel() == 0) {
    zero(grad_weight, launch);
    zero(grad_bias, launch);
    zero(row_sums, launch);
    return;
  }
  visit_statistics(rstd.dtype(), [&]<class T>() {
    // A gradient wider than the input is rounded to its dtype, as the plain op does.
    const bool wider = grad_output.itemsize() > input.itemsize();
    const Tensor x = dense(input), r = dense(residual), w = dense(weight),
                 g = wider ? dense_as(grad_output, input.dtype()) : dense(grad_output),
                 rstds = dense_as(rstd, DTypeOf<T>::value),
                 means = mean ? dense_as(*mean, DTypeOf<T>::value) : Tensor();
    std::vector<Tensor> more;
    for (const Tensor& term : terms) more.push_back(dense(term));
    if (stream_norm_gradients(launch, {.total = total,
                                       .low = low,
                                       .weight_sums = grad_weight,
                                       .bias_sums = grad_bias,
                                       .row_sums = row_sums,
                                       .grad = g,
                                       .residual = r,
                                       .input = x,
                                       .terms = more,
                                       .weight = w,
                                       .mean = means,
                                       .rstd = rstds,
                                       .rows = input.numel() / n,
                                       .n = n,
                                       .parts = parts}))
      return;
    Backward<T> p{Elements(total),
                  Elements(low),
                  Elements(g),
                  Elements(r),
                  Elements(x),
                  Elements(w),
                  mean ? means.data_as<T>() : nullptr,
                  rstds.data_as<T>(),
                  {},
                  input.numel() / n,
                  {}};
    for (size_t i = 0; i < more.size(); ++i) p.terms[i] = Elements(more[i]);
    const RowLaunch shape(p.rows, n, kRowItems<T>);
    const int64_t blocks =
        std::min<int64_t>({ceil_div<int64_t>(p.rows, 16), parts > 0 ? parts : p.rows,
                           int64_t{launch.properties().multiprocessors} * 4});
    const bool wants_sums = grad_weight.defined() || grad_bias.defined();
    const bool finishes = wants_sums && parts == 0;
    const Scratch partial(finishes ? static_cast<size_t>(blocks * 2 * n) * sizeof(T) : 8, launch);
    if (wants_sums) {
      const Tensor* const wanted[] = {&grad_weight, &grad_bias};
      for (int kind = 0; kind < 2; ++kind) {
        if (!wanted[kind]->defined()) continue;
        p.partial[kind] =
            finishes ? partial.data<T>() + kind * blocks * n : wanted[kind]->data_as<T>();
        if (!finishes) clear_rows(*wanted[kind], blocks, launch);
      }
      // Before the gradients: their sum may take the residual's place, never the operands'.
      launch(column_sums<T>,
             dim3(static_cast<unsigned>(ceil_div<int64_t>(n, 256)), static_cast<unsigned>(blocks)),
             dim3(256), 0, p, n);
    }
    if (n > kCachedRow<T>) {
      launch(norm_gradient_long<T>, shape.grid, shape.block, 0, p, n);
    } else {
      auto* kernel = norm_gradient<T, 1>;
      if constexpr (sizeof(T) == 4) {
        if (in_pieces(n, {p.total, p.low, p.grad, p.residual, p.in, p.weight, p.terms[0],
                          p.terms[1], p.terms[2]}))
          kernel = norm_gradient<T, 4>;
      }
      launch(kernel, shape.grid, shape.block, 0, p, static_cast<int>(n));
    }
    if (finishes) {
      ColumnPartsList<T> list;
      list.add(grad_weight, p.partial[0]);
      list.add(grad_bias, p.partial[1]);
      add_column_parts(launch, list, n, blocks);
    }
    if (row_sums.defined()) {
      const Tensor& of = low.defined() ? low : total;
      const int64_t over[] = {0};
      Tensor to = row_sums;
      std::optional<DType> dtype;
      if (parts > 0) {  // the first of them is all of the sum
        clear_rows(row_sums, 1, launch);
        to = make_view(row_sums, Dims{n}, Dims{1}, row_sums.storage_offset());
        dtype = to.dtype();
      }
      kernels_for(DeviceType::CUDA)
          .sum_dim(to, make_view(of, Dims{p.rows, n}, Dims{n, 1}, of.storage_offset()),
                   IntSpan(over), false, dtype);
    }
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t._residual_layer_norm = [](const Tensor& out, const Tensor& sum, const Tensor& mean,
                              const Tensor& rstd, const Tensor& self, const Tensor& residual,
                              IntSpan normalized_shape, const Tensor& weight, const Tensor& bias,
                              double eps, DType) {
    forward(out, sum, &mean, rstd, self, residual, product_of(normalized_shape), weight, bias, eps);
  };
  t._residual_rms_norm = [](const Tensor& out, const Tensor& sum, const Tensor& rstd,
                            const Tensor& self, const Tensor& residual, IntSpan normalized_shape,
                            const Tensor& weight, double eps, DType) {
    forward(out, sum, nullptr, rstd, self, residual, product_of(normalized_shape), weight, Tensor(),
            eps);
  };
  t._residual_layer_norm_backward =
      [](const Tensor& total, const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& low,
         const Tensor& row_sums, const Tensor& grad_output, const Tensor& residual,
         const Tensor& input, IntSpan normalized_shape, const Tensor& mean, const Tensor& rstd,
         const Tensor& weight, const Tensor&, std::optional<DType>, TensorSpan terms, bool,
         int64_t parts) {
        backward(total, grad_weight, grad_bias, low, row_sums, grad_output, residual, input,
                 product_of(normalized_shape), &mean, rstd, weight, terms, parts);
      };
  t._residual_rms_norm_backward =
      [](const Tensor& total, const Tensor& grad_weight, const Tensor& low, const Tensor& row_sums,
         const Tensor& grad_output, const Tensor& residual, const Tensor& input,
         IntSpan normalized_shape, const Tensor& rstd, const Tensor& weight, std::optional<DType>,
         TensorSpan terms, bool, int64_t parts) {
        backward(total, grad_weight, Tensor(), low, row_sums, grad_output, residual, input,
                 product_of(normalized_shape), nullptr, rstd, weight, terms, parts);
      };
});

}  // namespace
}  // namespace vt::cuda
