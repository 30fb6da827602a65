// layer_norm and rms_norm, forward and backward. Statistics are two-pass: rows up to 16K elements
// stay in registers, longer ones are read again. Weight and bias gradients are sums over rows in two
// stages of fixed order: groups of rows into scratch memory, then the groups. Where a CuTe kernel
// is chosen (cuda/cute), it takes the place of all but the last stage.
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/norm_stream.cuh"
#include "cuda/kernels/row_moments.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

/// Weight, bias: null, or as stored where that is S, else converted to T (kept alive in `owner`).
template <class S, class T>
Parameter<S, T> parameter(const Tensor& t, DType stored, Tensor& owner) {
  if (!t.defined()) return {};
  owner = dense_as(t, t.dtype() == stored ? stored : DTypeOf<T>::value);
  if (owner.dtype() == stored && is_aligned(owner.data())) return {owner.data(), false};
  owner = dense_as(owner, DTypeOf<T>::value);  // pieces of S are read in one access
  return {owner.data(), true};
}

template <class T>
struct Forward {
  T eps;
  T* means;  // null: not centred
  T* rstds;
  int64_t rows;
};

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    norm_cached(S* out, const S* in, Parameter<S, Compute<S>> weight,
                Parameter<S, Compute<S>> bias, Forward<Compute<S>> p, int n) {
  using T = Compute<S>;
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const S* x = in + row * n;
    T value[kPieces][W];
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
      load_piece<S, T, W>(x + c * step + first, value[c]);
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
      weight.load(at, w, T(1));
      bias.load(at, b, T(0));
#pragma unroll
      for (int k = 0; k < W; ++k) value[c][k] = (value[c][k] - mean) * rstd * w[k] + b[k];
      store_piece<S, T, W>(out + row * n + at, value[c]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kRowThreads)
    norm_long(S* out, const S* in, Parameter<S, Compute<S>> weight, Parameter<S, Compute<S>> bias,
              Forward<Compute<S>> p, int64_t n) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const S* x = in + row * n;
    T mean = T(0);
    if (p.means) {
      T sum = T(0);
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += convert<T>(x[i]);
      mean = row_reduce(sum, Plus(), shared) / static_cast<T>(n);
    }
    T squares = T(0);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const T d = convert<T>(x[i]) - mean;
      squares += d * d;
    }
    squares = row_reduce(squares, Plus(), shared) / static_cast<T>(n);
    const T rstd = T(1) / sqrt(squares + p.eps);
    if (threadIdx.x == 0) {
      if (p.means) p.means[row] = mean;
      p.rstds[row] = rstd;
    }
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      T w[1], b[1];
      weight.load(i, w, T(1));
      bias.load(i, b, T(0));
      out[row * n + i] = convert<S>((convert<T>(x[i]) - mean) * rstd * w[0] + b[0]);
    }
  }
}

/// Weight or bias for a CuTe kernel: in the rows' dtype where stored so, else in float, kept alive
/// in `owner`.
cute::Operand cute_parameter(const Tensor& t, DType stored, Tensor& owner) {
  if (!t.defined()) return {};
  owner = dense_as(t, t.dtype() == stored ? stored : DType::Float32);
  return {owner.data(), owner.dtype()};
}

/// forward() on dense rows through a CuTe kernel; false where none is chosen.
template <class Arguments>
bool forward_by_cute(const Launch& launch, const Tensor& out, const Tensor* mean,
                     const Tensor& rstd, const Tensor& x, int64_t n, const Tensor& weight,
                     const Tensor& bias, double eps) {
  if (!cute::considered<Arguments>()) return false;
  Tensor kept_weight, kept_bias;
  const DType stored = x.dtype();
  Arguments a;
  a.m = x.numel() / n;
  a.n = n;
  a.x = {x.data(), stored, n};
  a.y = {out.data(), stored, n};
  a.weight = cute_parameter(weight, stored, kept_weight);
  a.bias = cute_parameter(bias, stored, kept_bias);
  if (mean) a.mean = {mean->data(), mean->dtype()};
  a.rstd = {rstd.data(), rstd.dtype()};
  a.eps = static_cast<float>(eps);
  return cute::launch(a, launch);
}

void forward(const Tensor& out, const Tensor* mean, const Tensor& rstd, const Tensor& input,
             int64_t n, const Tensor& weight, const Tensor& bias, double eps) {
  if (input.numel() == 0) return;
  const Launch launch(input.device());
  const Tensor x = dense(input);
  if (mean ? forward_by_cute<cute::LayerNormForward>(launch, out, mean, rstd, x, n, weight, bias,
                                                     eps)
           : forward_by_cute<cute::RmsNormForward>(launch, out, mean, rstd, x, n, weight, bias,
                                                   eps))
    return;
  if (stream_norm(launch, {.out = out,
                           .mean = mean ? *mean : Tensor(),
                           .rstd = rstd,
                           .input = x,
                           .weight = dense(weight),
                           .bias = dense(bias),
                           .eps = eps,
                           .rows = input.numel() / n,
                           .n = n}))
    return;
  visit_float_storage(input.dtype(), [&]<class S>() {
    using T = Compute<S>;
    constexpr int W = kWidthOf<S>;
    Tensor kept_weight, kept_bias;
    const auto w = parameter<S, T>(weight, input.dtype(), kept_weight);
    const auto b = parameter<S, T>(bias, input.dtype(), kept_bias);
    const Forward<T> p{static_cast<T>(eps), mean ? mean->data_as<T>() : nullptr, rstd.data_as<T>(),
                       input.numel() / n};
    const RowLaunch shape(p.rows, n, kRowItems<T>);
    S* to = out.data_as<S>();
    const S* from = x.data_as<S>();
    if (n > kCachedRow<T>) {
      launch(norm_long<S>, shape.grid, shape.block, 0, to, from, w, b, p, n);
      return;
    }
    const bool wide = n % W == 0 && is_aligned(to) && is_aligned(from);
    launch(wide ? norm_cached<S, W> : norm_cached<S, 1>, shape.grid, shape.block, 0, to, from, w, b,
           p, static_cast<int>(n));
  });
}

template <class T>
struct Backward {
  const T* means;  // null: not centred
  const T* rstds;
  int64_t rows;
};

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    input_gradient_cached(S* out, const S* grad, const S* in, Parameter<S, Compute<S>> weight,
                          Backward<Compute<S>> p, int n) {
  using T = Compute<S>;
  constexpr int kPieces = kRowItems<T> / W;
  __shared__ T shared[kRowThreads / kWarp];
  const int step = blockDim.x * W, first = threadIdx.x * W;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const T mean = p.means ? p.means[row] : T(0), rstd = p.rstds[row];
    T x[kPieces][W], g[kPieces][W];
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
      load_piece<S, T, W>(in + row * n + c * step + first, x[c]);
      load_piece<S, T, W>(grad + row * n + c * step + first, g[c]);
    }
    T along = T(0), constant = T(0);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      T w[W];
      weight.load(at, w, T(1));
#pragma unroll
      for (int k = 0; k < W; ++k) {
        g[c][k] *= w[k];
        x[c][k] -= mean;
        along += g[c][k] * x[c][k];
        constant += g[c][k];
      }
    }
    along = row_reduce(along, Plus(), shared);
    constant = p.means ? row_reduce(constant, Plus(), shared) / static_cast<T>(n) : T(0);
    const T slope = along * rstd * rstd / static_cast<T>(n);
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < W; ++k) g[c][k] = rstd * (g[c][k] - constant - x[c][k] * slope);
      store_piece<S, T, W>(out + row * n + c * step + first, g[c]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kRowThreads)
    input_gradient_long(S* out, const S* grad, const S* in, Parameter<S, Compute<S>> weight,
                        Backward<Compute<S>> p, int64_t n) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T mean = p.means ? p.means[row] : T(0), rstd = p.rstds[row];
    const S* x = in + row * n;
    const S* dy = grad + row * n;
    T along = T(0), constant = T(0), w[1];
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      weight.load(i, w, T(1));
      const T g = convert<T>(dy[i]) * w[0];
      along += g * (convert<T>(x[i]) - mean);
      constant += g;
    }
    along = row_reduce(along, Plus(), shared);
    constant = p.means ? row_reduce(constant, Plus(), shared) / static_cast<T>(n) : T(0);
    const T slope = along * rstd * rstd / static_cast<T>(n);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      weight.load(i, w, T(1));
      out[row * n + i] = convert<S>(rstd * (convert<T>(dy[i]) * w[0] - constant -
                                            (convert<T>(x[i]) - mean) * slope));
    }
  }
}

// Sums over rows: threads (32 x W columns) x (8 rows of a group).
constexpr int kLines = 8;

/// partial[group] = the sums of dy * xhat and of dy over the group's rows, n values each.
template <class S, int W>
__global__ void __launch_bounds__(kWarp* kLines)
    group_sums(Compute<S>* partial, const S* grad, const S* in, Backward<Compute<S>> p, int64_t n,
               int64_t per_group) {
  using T = Compute<S>;
  __shared__ T shared[2][kLines][kWarp * W];
  const int64_t column = (int64_t{blockIdx.x} * kWarp + threadIdx.x) * W;
  const int64_t begin = blockIdx.y * per_group;
  const int64_t end = begin + per_group < p.rows ? begin + per_group : p.rows;
  T dw[W], db[W];
#pragma unroll
  for (int k = 0; k < W; ++k) dw[k] = db[k] = T(0);
  if (column < n) {
#pragma unroll 2
    for (int64_t row = begin + threadIdx.y; row < end; row += kLines) {
      const T mean = p.means ? p.means[row] : T(0), rstd = p.rstds[row];
      T x[W], g[W];
      load_piece<S, T, W>(in + row * n + column, x);
      load_piece<S, T, W>(grad + row * n + column, g);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        dw[k] += g[k] * ((x[k] - mean) * rstd);
        db[k] += g[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) {
    shared[0][threadIdx.y][threadIdx.x * W + k] = dw[k];
    shared[1][threadIdx.y][threadIdx.x * W + k] = db[k];
  }
  __syncthreads();
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  for (int i = thread; i < 2 * kWarp * W; i += kWarp * kLines) {
    const int which = i / (kWarp * W), c = i % (kWarp * W);
    const int64_t at = int64_t{blockIdx.x} * kWarp * W + c;
    if (at >= n) continue;
    T total = T(0);
#pragma unroll
    for (int line = 0; line < kLines; ++line) total += shared[which][line][c];
    partial[(int64_t{blockIdx.y} * 2 + which) * n + at] = total;
  }
}

/// Where the sums of group g and kind `which` (0: weight, 1: bias) begin: g * group + which * kind.
struct PartialStrides {
  int64_t group, kind;
};

template <class T>
__global__ void __launch_bounds__(kWarp* kLines)
    sum_groups(char* weight_out, DType weight_dtype, char* bias_out, DType bias_dtype,
               const T* partial, int64_t n, int groups, PartialStrides strides) {
  __shared__ T shared[kLines][kWarp];
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const int which = blockIdx.y;
  char* out = which == 0 ? weight_out : bias_out;
  if (!out) return;
  T total = T(0);
  if (column < n) {
    for (int g = threadIdx.y; g < groups; g += kLines)
      total += partial[g * strides.group + which * strides.kind + column];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= n) return;
  total = T(0);
#pragma unroll
  for (int line = 0; line < kLines; ++line) total += shared[line][threadIdx.x];
  const DType dtype = which == 0 ? weight_dtype : bias_dtype;
  store_as(out + column * (dtype == DType::Float64   ? 8
                           : dtype == DType::Float32 ? 4
                                                     : 2),
           dtype, total);
}

void zero(const Tensor& t, const Launch& launch) {
  if (!t.defined() || t.numel() == 0) return;
  check_cuda(cudaMemsetAsync(t.data(), 0, static_cast<size_t>(t.numel() * t.itemsize()),
                             launch.stream()),
             "filling a gradient with zeros");
}

/// Adds up partial sums of `groups` groups into the gradients that are wanted.
template <class T>
void sum_partials(const Launch& launch, const Tensor& grad_weight, const Tensor& grad_bias,
                  const T* partial, int64_t n, int64_t groups, PartialStrides strides) {
  const auto target = [](const Tensor& t) {
    return t.defined() ? static_cast<char*>(t.data()) : nullptr;
  };
  const auto dtype = [](const Tensor& t) { return t.defined() ? t.dtype() : DType::Float32; };
  launch(sum_groups<T>, dim3(static_cast<unsigned>(ceil_div<int64_t>(n, kWarp)), 2),
         dim3(kWarp, kLines), 0, target(grad_weight), dtype(grad_weight), target(grad_bias),
         dtype(grad_bias), partial, n, static_cast<int>(groups), strides);
}

template <class S, class T>
void parameter_gradients(const Launch& launch, const Tensor& grad_weight, const Tensor& grad_bias,
                         const S* g, const S* x, const Backward<T>& p, int64_t n) {
  if (!grad_weight.defined() && !grad_bias.defined()) return;
  constexpr int W = kWidthOf<S>;
  const bool wide = n % W == 0 && is_aligned(g) && is_aligned(x);
  const int64_t strips = ceil_div<int64_t>(n, kWarp * (wide ? W : 1));
  // Enough groups to fill the device; a group has at least 2 rows a thread.
  const int64_t wanted = ceil_div<int64_t>(launch.properties().multiprocessors * 4, strips);
  const int64_t most = std::min<int64_t>(ceil_div<int64_t>(p.rows, 2 * kLines), 65535);
  const int64_t per_group = ceil_div(p.rows, std::clamp<int64_t>(wanted, 1, most));
  const int64_t groups = ceil_div(p.rows, per_group);
  const Scratch partial(static_cast<size_t>(groups * 2 * n) * sizeof(T), launch);
  launch(wide ? group_sums<S, W> : group_sums<S, 1>,
         dim3(static_cast<unsigned>(strips), static_cast<unsigned>(groups)), dim3(kWarp, kLines), 0,
         partial.data<T>(), g, x, p, n, per_group);
  sum_partials(launch, grad_weight, grad_bias, partial.data<T>(), n, groups,
               PartialStrides{2 * n, n});
}

/// backward() on dense rows through a CuTe kernel; false where none is chosen.
template <class Arguments>
bool backward_by_cute(const Launch& launch, const Tensor& grad_input, const Tensor& grad_weight,
                      const Tensor& grad_bias, const Tensor& dy, const Tensor& x, int64_t n,
                      const Tensor* mean, const Tensor& rstd, const Tensor& weight) {
  if (!cute::considered<Arguments>() || x.dtype() == DType::Float64) return false;
  const Tensor rstds = dense_as(rstd, DType::Float32),
               means = mean ? dense_as(*mean, DType::Float32) : Tensor();
  Tensor kept_weight;
  const DType stored = x.dtype();
  Arguments a;
  a.m = x.numel() / n;
  a.n = n;
  // As many groups of threads as the device holds at once, by what a row of n asks of a block.
  const int64_t wanted =
      launch.properties().multiprocessors * std::clamp<int64_t>(8192 / n, 1, 16);
  a.groups = ceil_div<int64_t>(std::min(wanted, a.m), 4) * 4;
  a.dy = {dy.data(), stored, n};
  a.total = {x.data(), stored, n};
  a.weight = cute_parameter(weight, stored, kept_weight);
  if (mean) a.mean = {means.data(), DType::Float32};
  a.rstd = {rstds.data(), DType::Float32};
  a.dx = {grad_input.data(), stored, n};
  const bool sums = grad_weight.defined() || grad_bias.defined();
  const Scratch partial(sums ? static_cast<size_t>(2 * a.groups * n) * sizeof(float) : 0, launch);
  if (grad_weight.defined()) a.weight_parts = {partial.data<float>(), DType::Float32, n};
  if (grad_bias.defined())
    a.bias_parts = {partial.data<float>() + a.groups * n, DType::Float32, n};
  if (!cute::launch(a, launch)) return false;
  if (sums) {
    sum_partials(launch, grad_weight, grad_bias, partial.data<float>(), n, a.groups,
                 PartialStrides{n, a.groups * n});
  }
  return true;
}

void backward(const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias,
              const Tensor& grad_out, const Tensor& input, int64_t n, const Tensor* mean,
              const Tensor& rstd, const Tensor& weight) {
  const Launch launch(input.device());
  if (input.numel() == 0) {
    zero(grad_weight, launch);
    zero(grad_bias, launch);
    return;
  }
  const Tensor x = dense(input), dy = dense_as(grad_out, input.dtype());
  if (mean ? backward_by_cute<cute::LayerNormBackward>(launch, grad_input, grad_weight, grad_bias,
                                                       dy, x, n, mean, rstd, weight)
           : backward_by_cute<cute::RmsNormBackward>(launch, grad_input, grad_weight, grad_bias, dy,
                                                     x, n, mean, rstd, weight))
    return;
  if (input.dtype() != DType::Float64 &&
      stream_norm_gradients(launch,
                            {.total = grad_input,
                             .weight_sums = grad_weight,
                             .bias_sums = grad_bias,
                             .grad = dy,
                             .input = x,
                             .weight = dense(weight),
                             .mean = mean ? dense_as(*mean, DType::Float32) : Tensor(),
                             .rstd = dense_as(rstd, DType::Float32),
                             .rows = input.numel() / n,
                             .n = n}))
    return;
  visit_float_storage(input.dtype(), [&]<class S>() {
    using T = Compute<S>;
    constexpr int W = kWidthOf<S>;
    const Tensor rstds = dense_as(rstd, DTypeOf<T>::value),
                 means = mean ? dense_as(*mean, DTypeOf<T>::value) : Tensor();
    Tensor kept_weight;
    const auto w = parameter<S, T>(weight, input.dtype(), kept_weight);
    const Backward<T> p{mean ? means.data_as<T>() : nullptr, rstds.data_as<T>(),
                        input.numel() / n};
    const RowLaunch shape(p.rows, n, kRowItems<T>);
    S* to = grad_input.data_as<S>();
    const S* g = dy.data_as<S>();
    const S* from = x.data_as<S>();
    if (n > kCachedRow<T>) {
      launch(input_gradient_long<S>, shape.grid, shape.block, 0, to, g, from, w, p, n);
    } else {
      const bool wide = n % W == 0 && is_aligned(to) && is_aligned(g) && is_aligned(from);
      launch(wide ? input_gradient_cached<S, W> : input_gradient_cached<S, 1>, shape.grid,
             shape.block, 0, to, g, from, w, p, static_cast<int>(n));
    }
    parameter_gradients<S, T>(launch, grad_weight, grad_bias, g, from, p, n);
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.native_layer_norm = [](const Tensor& out, const Tensor& mean, const Tensor& rstd,
                           const Tensor& input, IntSpan normalized_shape, const Tensor& weight,
                           const Tensor& bias, double eps) {
    forward(out, &mean, rstd, input, product_of(normalized_shape), weight, bias, eps);
  };
  t.native_layer_norm_backward =
      [](const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias,
         const Tensor& grad_out, const Tensor& input, IntSpan normalized_shape, const Tensor& mean,
         const Tensor& rstd, const Tensor& weight, const Tensor&) {
        backward(grad_input, grad_weight, grad_bias, grad_out, input, product_of(normalized_shape),
                 &mean, rstd, weight);
      };
  t._rms_norm = [](const Tensor& out, const Tensor& rstd, const Tensor& input,
                   IntSpan normalized_shape, const Tensor& weight, double eps) {
    forward(out, nullptr, rstd, input, product_of(normalized_shape), weight, Tensor(), eps);
  };
  t._rms_norm_backward = [](const Tensor& grad_input, const Tensor& grad_weight,
                            const Tensor& grad_out, const Tensor& input, IntSpan normalized_shape,
                            const Tensor& rstd, const Tensor& weight) {
    backward(grad_input, grad_weight, Tensor(), grad_out, input, product_of(normalized_shape),
             nullptr, rstd, weight);
  };
});

}  // namespace
}  // namespace vt::cuda
