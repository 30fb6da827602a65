// Kernels of mm, bmm, addmm, baddbmm, mv, addmv, dot and linear: they read the operands' strides
// and hand floating products to a CuTe kernel where one was measured to be faster (cuda/cute), else
// to cuBLASLt, small ones to matmul_small.cu. Integers, and what the library has no algorithm for,
// go through a tiled kernel here.
#include "cuda/cublaslt.h"
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/activation_math.cuh"
#include "cuda/kernels/column_sums.cuh"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/matmul_float.cuh"
#include "cuda/kernels/matmul_padded.cuh"
#include "cuda/kernels/matmul_small.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kTile = 16;

struct TiledProblem {
  const char* a;
  const char* b;
  char* c;
  const char* bias;
  int64_t m, n, k;
  int64_t a_row, a_column, a_step, b_row, b_column, b_step, c_row, c_step;  // bytes
  DType dtype, out_dtype;
  double alpha, beta;
};

/// One 16 x 16 tile of c a block; integers wrap in 64 bits.
template <class T>
__global__ void tiled_gemm_kernel(const __grid_constant__ TiledProblem p) {
  __shared__ T a_tile[kTile][kTile + 1];
  __shared__ T b_tile[kTile][kTile + 1];
  const int64_t row = int64_t{blockIdx.y} * kTile + threadIdx.y;
  const int64_t column = int64_t{blockIdx.x} * kTile + threadIdx.x;
  const char* a = p.a + blockIdx.z * p.a_step;
  const char* b = p.b + blockIdx.z * p.b_step;
  T sum = 0;
  for (int64_t k0 = 0; k0 < p.k; k0 += kTile) {
    const int64_t ka = k0 + threadIdx.x, kb = k0 + threadIdx.y;
    a_tile[threadIdx.y][threadIdx.x] =
        row < p.m && ka < p.k ? load_as<T>(a + row * p.a_row + ka * p.a_column, p.dtype) : T(0);
    b_tile[threadIdx.y][threadIdx.x] =
        kb < p.k && column < p.n ? load_as<T>(b + kb * p.b_row + column * p.b_column, p.dtype)
                                 : T(0);
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += a_tile[threadIdx.y][i] * b_tile[i][threadIdx.x];
    __syncthreads();
  }
  if (row >= p.m || column >= p.n) return;
  const int64_t size = item_size(p.out_dtype);
  char* c = p.c + blockIdx.z * p.c_step + row * p.c_row + column * size;
  T result = p.alpha == 1 ? sum : static_cast<T>(static_cast<T>(p.alpha) * sum);
  if (p.beta != 0) result += static_cast<T>(p.beta) * load_as<T>(c, p.out_dtype);
  if (p.bias) result += load_as<T>(p.bias + column * size, p.dtype);
  store_as<T>(c, p.out_dtype, result);
}

/// A matrix (or a batch of them) with its strides in elements.
struct Operand {
  Tensor tensor;
  int64_t rows, columns, row_stride, column_stride, step;
};

/// As cuBLASLt takes it: one of the strides 1, the other at least the extent. False if it is not.
bool as_gemm_operand(const Operand& o, GemmOperand& out) {
  const auto fits = [](int64_t extent, int64_t unit, int64_t other_extent, int64_t other) {
    return (unit == 1 || extent == 1) && (other >= std::max<int64_t>(extent, 1) || other_extent == 1);
  };
  out.data = o.tensor.data();
  out.step = o.step;
  if (fits(o.columns, o.column_stride, o.rows, o.row_stride)) {
    out.transposed = false;
    out.ld = o.rows == 1 ? std::max<int64_t>(o.columns, 1) : o.row_stride;
    return true;
  }
  if (fits(o.rows, o.row_stride, o.columns, o.column_stride)) {
    out.transposed = true;
    out.ld = o.columns == 1 ? std::max<int64_t>(o.rows, 1) : o.column_stride;
    return true;
  }
  return false;
}

Operand matrix(const Tensor& t) {
  const int64_t d = t.dim();
  return {t,
          t.sizes()[d - 2],
          t.sizes()[d - 1],
          t.strides()[d - 2],
          t.strides()[d - 1],
          d > 2 ? t.strides()[0] : 0};
}
Operand column(const Tensor& t) { return {t, t.sizes()[0], 1, t.strides()[0], 1, 0}; }
Operand row(const Tensor& t) { return {t, 1, t.sizes()[0], 1, t.strides()[0], 0}; }

/// The same operand over dense memory.
Operand dense(const Operand& o) {
  Operand out = o;
  out.tensor = contiguous(o.tensor);
  out.column_stride = 1;
  out.row_stride = o.columns;
  out.step = o.rows * o.columns;
  return out;
}

void tiled_gemm(const Launch& launch, DType dtype, DType out_dtype, int64_t batch,
                const Operand& a, const Operand& b, double alpha, double beta, char* c, int64_t ldc,
                int64_t step_c, const void* bias) {
  const int64_t size = item_size(dtype), out_size = item_size(out_dtype);
  TiledProblem p{static_cast<const char*>(a.tensor.data()),
                 static_cast<const char*>(b.tensor.data()),
                 c,
                 static_cast<const char*>(bias),
                 a.rows,
                 b.columns,
                 a.columns,
                 a.row_stride * size,
                 a.column_stride * size,
                 a.step * size,
                 b.row_stride * size,
                 b.column_stride * size,
                 b.step * size,
                 ldc * out_size,
                 step_c * out_size,
                 dtype,
                 out_dtype,
                 alpha,
                 beta};
  // grid.y and grid.z hold at most 65535 blocks.
  constexpr int64_t kMaxBlocks = 65535;
  const TiledProblem whole = p;
  visit_compute_numeric(dtype, [&]<class T>() {
    for (int64_t z = 0; z < batch; z += kMaxBlocks) {
      for (int64_t y = 0; y < whole.m; y += kMaxBlocks * kTile) {
        p = whole;
        p.m = std::min(whole.m - y, kMaxBlocks * kTile);
        p.a += z * p.a_step + y * p.a_row;
        p.b += z * p.b_step;
        p.c += z * p.c_step + y * p.c_row;
        const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.n, kTile)),
                        static_cast<unsigned>(ceil_div<int64_t>(p.m, kTile)),
                        static_cast<unsigned>(std::min(batch - z, kMaxBlocks)));
        launch(tiled_gemm_kernel<T>, grid, dim3(kTile, kTile), 0, p);
      }
    }
  });
}

cute::Operand cute_operand(const void* data, DType dtype, int64_t row_stride, int64_t step) {
  cute::Operand o(data, dtype);
  o.strides = {step, row_stride};
  return o;
}

/// What CuTe kernels are compiled for.
bool cute_knows(DType dtype) { return dtype == DType::BFloat16 || dtype == DType::Float16; }

/// A CuTe kernel's operands, result and launch; false if the kernel is not to be asked for.
template <class Arguments>
bool cute_product(Arguments& to, const GemmProblem& p, const Launch& launch) {
  if (!cute_knows(p.dtype) || !cute::considered<Arguments>()) return false;
  to.l = p.batch;
  to.m = p.m;
  to.n = p.n;
  to.k = p.k;
  to.a = cute_operand(p.a.data, p.dtype, p.a.ld, p.a.step);
  to.b = cute_operand(p.b.data, p.dtype, p.b.ld, p.b.step);
  to.d = cute_operand(p.c, p.dtype, p.ldc, p.step_c);
  to.max_blocks = launch.properties().multiprocessors;
  return true;
}

template <class Arguments>
bool plain_by_cute(const GemmProblem& p, const Launch& launch) {
  Arguments a;
  return cute_product(a, p, launch) && cute::launch(a, launch);
}
template <class Arguments>
bool sum_by_cute(const GemmProblem& p, const Launch& launch) {
  Arguments a;
  if (!cute_product(a, p, launch)) return false;
  a.c = a.d;
  return cute::launch(a, launch);
}

/// The product by a CuTe kernel; false where none is chosen.
bool product_by_cute(const GemmProblem& p, const Launch& launch) {
  if (!cute_knows(p.dtype) || p.alpha != 1 || (p.beta != 0 && p.beta != 1)) return false;
  const bool tn = !p.a.transposed && p.b.transposed, nn = !p.a.transposed && !p.b.transposed;
  const bool nt = p.a.transposed && !p.b.transposed;
  if (p.bias) {
    cute::GemmBiasTn a;
    if (!tn || p.beta != 0 || !cute_product(a, p, launch)) return false;
    a.bias = {p.bias, p.dtype};
    return cute::launch(a, launch);
  }
  if (p.beta == 0)
    return tn   ? plain_by_cute<cute::GemmTn>(p, launch)
           : nn ? plain_by_cute<cute::GemmNn>(p, launch)
           : nt ? plain_by_cute<cute::GemmNt>(p, launch)
                : false;
  return tn   ? sum_by_cute<cute::GemmAddTn>(p, launch)
         : nn ? sum_by_cute<cute::GemmAddNn>(p, launch)
         : nt ? sum_by_cute<cute::GemmAddNt>(p, launch)
              : false;
}

/// `added` as a small product reads it, broadcast to out (rows; rows and columns; a batch of them).
void set_added(SmallProduct& p, const Tensor& added, const Tensor& out) {
  int64_t stride[3] = {};  // of the last dimensions, from the end
  for (int64_t i = 0; i < added.dim(); ++i) {
    const int64_t d = added.dim() - 1 - i;
    stride[i] = added.sizes()[d] == 1 ? 0 : added.strides()[d];
  }
  p.c = added.data();
  if (out.dim() == 1) {
    p.c_row = stride[0];
  } else {
    p.c_column = stride[0];
    p.c_row = stride[1];
    p.c_step = stride[2];
  }
}

bool is_view_of(const Tensor& a, const Tensor& b) {
  const auto same = [](IntSpan x, IntSpan y) { return std::equal(x.begin(), x.end(), y.begin(), y.end()); };
  return a.data() == b.data() && same(a.sizes(), b.sizes()) && same(a.strides(), b.strides());
}

/// out = alpha * a @ b + beta * added + bias; out has dense rows, `added` broadcasts to it, may be
/// it, and is not read where beta is 0.
void gemm(const Tensor& out, int64_t batch, Operand a, Operand b, double alpha, double beta,
          int64_t ldc, int64_t step_c, const void* bias = nullptr, const Tensor* added = nullptr) {
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  const DType dtype = out.dtype();
  if (is_floating(dtype) && is_small_product(dtype, batch, a.rows, b.columns, a.columns)) {
    SmallProduct p{.a = a.tensor.data(),
                   .b = b.tensor.data(),
                   .bias = bias,
                   .out = out.data(),
                   .batch = batch,
                   .m = a.rows,
                   .n = b.columns,
                   .k = a.columns,
                   .a_row = a.row_stride,
                   .a_column = a.column_stride,
                   .a_step = a.step,
                   .b_row = b.row_stride,
                   .b_column = b.column_stride,
                   .b_step = b.step,
                   .out_row = ldc,
                   .out_step = step_c,
                   .alpha = alpha,
                   .beta = beta};
    if (added && beta != 0) set_added(p, *added, out);
    small_product(launch, dtype, p);
    return;
  }
  if (added && beta != 0 && !is_view_of(out, *added)) copy(out, *added, true);
  GemmProblem p{.dtype = dtype, .batch = batch, .m = a.rows, .n = b.columns, .k = a.columns};
  if (is_floating(dtype) && p.k > 0) {
    if (!as_gemm_operand(a, p.a)) as_gemm_operand(a = dense(a), p.a);
    if (!as_gemm_operand(b, p.b)) as_gemm_operand(b = dense(b), p.b);
    p.c = out.data();
    p.ldc = std::max<int64_t>(ldc, p.n);
    p.step_c = step_c;
    p.alpha = alpha;
    p.beta = beta;
    p.bias = bias;
    if (product_by_cute(p, launch) || float_product(launch, p)) return;
    if (padded_product(launch, p)) return;
    if (cublaslt_gemm(p, {launch.stream(), launch.device()})) return;
  }
  tiled_gemm(launch, dtype, dtype, batch, a, b, alpha, beta, static_cast<char*>(out.data()), ldc, step_c,
             bias);
}

/// The same matrix with its columns dense in memory; both strides multiples of 16 bytes.
bool is_column_major(const Operand& o) {
  return o.row_stride == 1 && o.column_stride >= o.rows && o.column_stride % 16 == 0;
}
Operand column_major(const Operand& o) {
  if (is_column_major(o)) return o;
  const Tensor turned = contiguous(make_view(o.tensor, Dims{o.columns, o.rows},
                                             Dims{o.column_stride, o.row_stride},
                                             o.tensor.storage_offset()));
  return {turned, o.rows, o.columns, 1, o.rows, 0};
}

/// int8 products, summed in int32. The tensor cores want both operands dense along k, in pieces of
/// 16 bytes; other sizes go through the tiled kernel.
void int_mm(const Tensor& out, const Tensor& self, const Tensor& mat2) {
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  const Operand a = matrix(self), b = matrix(mat2);
  if (a.columns > 0 && a.columns % 16 == 0 && b.columns % 8 == 0 && a.rows > 16) {
    const bool fits = a.column_stride == 1 && a.row_stride >= a.columns && a.row_stride % 16 == 0;
    const Operand left = fits ? a : dense(a), right = column_major(b);
    const GemmProblem p{.dtype = DType::Int8,
                        .m = a.rows,
                        .n = b.columns,
                        .k = a.columns,
                        .a = {left.tensor.data(), left.row_stride, 0, false},
                        .b = {right.tensor.data(), right.column_stride, 0, true},
                        .c = out.data(),
                        .ldc = b.columns};
    if (cublaslt_gemm(p, {launch.stream(), launch.device()})) return;
  }
  tiled_gemm(launch, DType::Int8, DType::Int32, 1, a, b, 1, 0, static_cast<char*>(out.data()),
             b.columns, 0, nullptr);
}

/// The operands of a product of rows with a transposed weight.
struct LinearOperands {
  Operand a, b;
  Tensor bias;
  int64_t n;

  LinearOperands(const Tensor& out, const Tensor& input, const Tensor& weight, const Tensor& added)
      : bias(added.defined() ? contiguous(added) : added), n(weight.sizes()[0]) {
    const int64_t k = weight.sizes()[1], rows = out.numel() / n;
    // Rows of a contiguous (or 2-D) input are walked with one stride.
    const Tensor x = input.dim() == 2 || input.is_contiguous() ? input : contiguous(input);
    a = {x, rows, k, k, 1, 0};
    if (x.dim() == 2) a = matrix(x);
    if (x.dim() == 1) a.column_stride = x.strides()[0];
    const Dims across{weight.strides()[1], weight.strides()[0]};
    b = matrix(make_view(weight, Dims{k, n}, across, weight.storage_offset()));
  }
  const void* bias_data() const { return bias.defined() ? bias.data() : nullptr; }
};

void linear(const Tensor& out, const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (out.numel() == 0) return;
  const LinearOperands o(out, input, weight, bias);
  gemm(out, 1, o.a, o.b, 1, 0, o.n, 0, o.bias_data());
}

enum class Activation : int32_t { Relu, Gelu, GeluTanh, Silu };

Activation activation_of(std::string_view name) {
  return name == "relu"   ? Activation::Relu
         : name == "gelu" ? Activation::Gelu
         : name == "silu" ? Activation::Silu
                          : Activation::GeluTanh;
}

template <class T>
__device__ inline T activated(Activation activation, T x) {
  switch (activation) {
    case Activation::Relu:
      return x != x ? x : x > T(0) ? x : T(0);
    case Activation::Gelu:
      return gelu(x);
    case Activation::GeluTanh:
      return gelu_tanh(x);
    default:
      return silu(x);
  }
}
template <class T>
__device__ inline T slope(Activation activation, T x) {
  switch (activation) {
    case Activation::Gelu:
      return gelu_slope(x);
    case Activation::GeluTanh:
      return gelu_tanh_slope(x);
    default:
      return silu_slope(x);
  }
}

/// out = activation(in), or with `saved` in * its derivative there; out may be in. Pieces of N
/// elements, all aligned to their size.
template <class S, int N>
__global__ void apply_activation(S* out, const S* in, const S* saved, Activation activation,
                                 int64_t pieces) {
  using T = Compute<S>;
  using Piece = Vector<S, N>;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * blockDim.x) {
    const Piece x = reinterpret_cast<const Piece*>(in)[i];
    Piece y, at = x;
    if (saved) at = reinterpret_cast<const Piece*>(saved)[i];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T v = convert<T>(x.value[j]), where = convert<T>(at.value[j]);
      if (!saved)
        y.value[j] = convert<S>(activated(activation, v));
      else if (activation == Activation::Relu)
        y.value[j] = where <= T(0) ? convert<S>(T(0)) : x.value[j];
      else
        y.value[j] = convert<S>(v * slope(activation, where));
    }
    reinterpret_cast<Piece*>(out)[i] = y;
  }
}

void apply(const Tensor& out, const Tensor& in, const Tensor& saved, Activation activation) {
  const Launch launch(out.device());
  const int64_t n = out.numel();
  visit_float_storage(out.dtype(), [&]<class S>() {
    S* to = out.data_as<S>();
    const S* from = in.data_as<S>();
    const S* at = saved.defined() ? saved.data_as<S>() : nullptr;
    constexpr int N = 16 / sizeof(S);
    const bool wide = n % N == 0 && is_aligned(to) && is_aligned(from) && is_aligned(at);
    const int64_t pieces = wide ? n / N : n;
    const auto blocks = static_cast<unsigned>(launch.fill(ceil_div<int64_t>(pieces, 256), 256));
    launch(wide ? apply_activation<S, N> : apply_activation<S, 1>, dim3(blocks), dim3(256), 0, to,
           from, at, activation, pieces);
  });
}

/// One product without a batch; nullopt where its operands would have to be copied, or where the
/// library's epilogues are not for it.
std::optional<GemmProblem> problem_of(const Tensor& out, const Operand& a, const Operand& b,
                                      int64_t ldc) {
  const DType dtype = out.dtype();
  if (dtype == DType::Float64 || a.columns == 0) return std::nullopt;
  if (is_small_product(dtype, 1, a.rows, b.columns, a.columns)) return std::nullopt;
  GemmProblem p{.dtype = dtype, .m = a.rows, .n = b.columns, .k = a.columns};
  if (!as_gemm_operand(a, p.a) || !as_gemm_operand(b, p.b)) return std::nullopt;
  p.c = out.data();
  p.ldc = std::max<int64_t>(ldc, p.n);
  return p;
}

/// The product with an epilogue of the library; false if it has none for this problem.
bool product_with(GemmEpilogue epilogue, std::optional<GemmProblem> p, const Launch& launch,
                  const void* bias, void* aux) {
  if (!p || (aux && p->ldc % 8 != 0)) return false;
  // In float32 its tanh is less exact than the sums.
  if (aux && p->dtype == DType::Float32) return false;
  p->bias = bias;
  p->epilogue = epilogue;
  p->aux = aux;
  return cublaslt_gemm(*p, {launch.stream(), launch.device()});
}

/// gelu of a linear, which is kept, by a CuTe kernel; false where none is chosen.
template <class Arguments>
bool activation_by_cute(const GemmProblem& p, const void* bias, void* kept, const Launch& launch) {
  Arguments a;
  if (p.a.transposed || !p.b.transposed || !cute_product(a, p, launch)) return false;
  a.bias = {bias, p.dtype};
  a.z = cute_operand(kept, p.dtype, p.ldc, 0);
  return cute::launch(a, launch);
}

void linear_activation(const Tensor& out, const Tensor& kept, const Tensor& input,
                       const Tensor& weight, const Tensor& bias, std::string_view name, bool) {
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  const Activation activation = activation_of(name);
  const LinearOperands o(out, input, weight, bias);
  const auto p = problem_of(out, o.a, o.b, o.n);
  if (activation == Activation::Relu && !kept.defined() &&
      product_with(GemmEpilogue::Relu, p, launch, o.bias_data(), nullptr))
    return;
  if (kept.defined() && p) {
    if (activation == Activation::Gelu &&
        activation_by_cute<cute::GemmBiasGeluTn>(*p, o.bias_data(), kept.data(), launch))
      return;
    if (activation == Activation::GeluTanh &&
        (activation_by_cute<cute::GemmBiasGeluTanhTn>(*p, o.bias_data(), kept.data(), launch) ||
         product_with(GemmEpilogue::GeluTanh, p, launch, o.bias_data(), kept.data())))
      return;
  }
  const Tensor& product = kept.defined() ? kept : out;
  gemm(product, 1, o.a, o.b, 1, 0, o.n, 0, o.bias_data());
  apply(out, product, Tensor(), activation);
}

// CuTe kernels write a row of column sums for each warp of a tile.
constexpr int64_t kSumsTile = 128, kSumsRows = 4;

/// What a product with an activation's slope makes; undefined: not wanted.
struct SlopeResults {
  Tensor out, sums, activated;
};

/// A product times the slope of gelu at `at`, and the other results that are wanted, by a CuTe kernel;
/// false where none is chosen.
template <class Arguments>
bool slope_by_cute(const GemmProblem& p, const Tensor& at, const SlopeResults& to,
                   const Launch& launch) {
  Arguments a;
  if (p.a.transposed || p.b.transposed || !cute_product(a, p, launch)) return false;
  a.z = cute_operand(at.data(), p.dtype, p.n, 0);
  if constexpr (requires { a.y; }) a.y = cute_operand(to.activated.data(), p.dtype, p.n, 0);
  const Tensor& sums = to.sums;
  a.parts = 1;
  if (!sums.defined()) return cute::launch(a, launch);
  a.parts = ceil_div(p.m, kSumsTile) * kSumsRows;
  const Scratch parts(static_cast<size_t>(a.parts * p.n) * sizeof(float), launch);
  a.sums = {parts.data(), DType::Float32, p.n};
  if (!cute::launch(a, launch)) return false;
  ColumnPartsList<float> list;
  list.add(sums, parts.data<float>());
  add_column_parts(launch, list, p.n, a.parts);
  return true;
}

/// The same for either form of gelu; false for other activations.
template <class Erf, class Tanh>
bool gelu_slope_by_cute(Activation activation, const std::optional<GemmProblem>& p,
                        const Tensor& at, const SlopeResults& to, const Launch& launch) {
  if (!p) return false;
  if (activation == Activation::Gelu) return slope_by_cute<Erf>(*p, at, to, launch);
  return activation == Activation::GeluTanh && slope_by_cute<Tanh>(*p, at, to, launch);
}

/// The product times the derivative; true where its sums are there too.
bool activation_backward(const SlopeResults& to, const Tensor& self, const Tensor& mat2,
                         const Tensor& saved, std::string_view name) {
  const Tensor& out = to.out;
  const Launch launch(out.device());
  const Activation activation = activation_of(name);
  const Tensor at = contiguous(saved);
  const auto p = problem_of(out, matrix(self), matrix(mat2), out.strides()[0]);
  if (to.activated.defined()) {
    if (gelu_slope_by_cute<cute::GemmSlopeGeluAgainNn, cute::GemmSlopeGeluTanhAgainNn>(
            activation, p, at, to, launch))
      return true;
    apply(to.activated, at, Tensor(), activation);
  }
  if (gelu_slope_by_cute<cute::GemmSlopeGeluNn, cute::GemmSlopeGeluTanhNn>(activation, p, at, to,
                                                                           launch))
    return true;
  if (activation == Activation::GeluTanh &&
      product_with(GemmEpilogue::GeluTanhBackward, p, launch, nullptr, at.data()))
    return false;
  gemm(out, 1, matrix(self), matrix(mat2), 1, 0, out.strides()[0], 0);
  apply(out, out, at, activation);
  return false;
}

void mm_activation_backward(const Tensor& out, const Tensor& sums, const Tensor& activated,
                            const Tensor& self, const Tensor& mat2, const Tensor& saved,
                            std::string_view name, bool, bool) {
  const bool summed =
      out.numel() > 0 && activation_backward({out, sums, activated}, self, mat2, saved, name);
  const int64_t over[] = {0};
  if (sums.defined() && !summed)
    kernels_for(DeviceType::CUDA).sum_dim(sums, out, IntSpan(over), false, std::nullopt);
}

void mm_row_sums(const Tensor& out, const Tensor& sums, const Tensor& self, const Tensor& mat2) {
  gemm(out, 1, matrix(self), matrix(mat2), 1, 0, out.strides()[0], 0);
  const int64_t over[] = {1};
  kernels_for(DeviceType::CUDA).sum_dim(sums, self, IntSpan(over), false, std::nullopt);
}

const RegisterCuda registered([](KernelTable& t) {
  t.mm = [](const Tensor& out, const Tensor& self, const Tensor& mat2) {
    gemm(out, 1, matrix(self), matrix(mat2), 1, 0, out.strides()[0], 0);
  };
  t._int_mm = int_mm;
  t.bmm = [](const Tensor& out, const Tensor& self, const Tensor& mat2) {
    gemm(out, self.sizes()[0], matrix(self), matrix(mat2), 1, 0, out.strides()[1],
         out.strides()[0]);
  };
  t.addmm = [](const Tensor& out, const Tensor& self, const Tensor& mat1, const Tensor& mat2,
               const Scalar& beta, const Scalar& alpha) {
    gemm(out, 1, matrix(mat1), matrix(mat2), alpha.to_double(), beta.to_double(), out.strides()[0],
         0, nullptr, &self);
  };
  t.baddbmm = [](const Tensor& out, const Tensor& self, const Tensor& batch1, const Tensor& batch2,
                 const Scalar& beta, const Scalar& alpha) {
    gemm(out, batch1.sizes()[0], matrix(batch1), matrix(batch2), alpha.to_double(),
         beta.to_double(), out.strides()[1], out.strides()[0], nullptr, &self);
  };
  t.mv = [](const Tensor& out, const Tensor& self, const Tensor& vec) {
    gemm(out, 1, matrix(self), column(vec), 1, 0, 1, 0);
  };
  t.addmv = [](const Tensor& out, const Tensor& self, const Tensor& mat, const Tensor& vec,
               const Scalar& beta, const Scalar& alpha) {
    gemm(out, 1, matrix(mat), column(vec), alpha.to_double(), beta.to_double(), 1, 0, nullptr,
         &self);
  };
  t.dot = [](const Tensor& out, const Tensor& self, const Tensor& other) {
    gemm(out, 1, row(self), column(other), 1, 0, 1, 0);
  };
  t.linear = linear;
  t._linear_activation = linear_activation;
  t._mm_activation_backward = mm_activation_backward;
  t._mm_row_sums = mm_row_sums;
});

}  // namespace
}  // namespace vt::cuda
