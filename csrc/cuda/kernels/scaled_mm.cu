// _scaled_mm: products of 8-bit floats with scales, by cuBLASLt's FP8 products. What the library
// does not take (extents that are no multiples of 16, e5m2 with e5m2) is multiplied as float, which
// is exact but slow. Scales by row and column, and results of 8-bit floats, are a pass over the sums.
#include "core/float8.h"
#include "cuda/cublaslt.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/element.cuh"

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;

struct Finish {
  const float* sums;  // m x n, dense; may be the output
  char* out;
  DType dtype;
  const float *row_scales, *column_scales;
  bool by_row, by_column;     // else a single scale
  const float* bias;          // n, or null
  const float* scale_result;  // divides, or null
  int64_t m, n;
};

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Finish p) {
  const float divisor = p.scale_result ? *p.scale_result : 1.0f;
  const int64_t size = p.dtype == DType::Float32 ? 4 : is_float8(p.dtype) ? 1 : 2;
  for (int64_t i = blockIdx.y; i < p.m; i += gridDim.y) {
    const float row = p.row_scales[p.by_row ? i : 0];
    for (int64_t j = int64_t{blockIdx.x} * kThreads + threadIdx.x; j < p.n;
         j += int64_t{gridDim.x} * kThreads) {
      float x = p.sums[i * p.n + j] * row * p.column_scales[p.by_column ? j : 0];
      if (p.bias) x += p.bias[j];
      x /= divisor;
      char* const target = p.out + (i * p.n + j) * size;
      if (is_float8(p.dtype))
        *reinterpret_cast<uint8_t*>(target) = float8_bits(x, p.dtype);
      else
        store_as<float>(target, p.dtype, x);
    }
  }
}

bool dense_rows(const Tensor& t) {
  const auto aligned = [](int64_t n) { return n % 16 == 0; };
  return t.strides()[1] == 1 && t.strides()[0] >= t.sizes()[1] && aligned(t.strides()[0]) &&
         aligned(reinterpret_cast<intptr_t>(t.data()));
}

Tensor transposed(const Tensor& t) {
  return make_view(t, Dims{t.sizes()[1], t.sizes()[0]}, Dims{t.strides()[1], t.strides()[0]},
                   t.storage_offset());
}

Tensor as_float(const Tensor& t) {
  if (!t.defined() || t.dtype() == DType::Float32) return t.defined() ? contiguous(t) : t;
  const Tensor out = empty(t.sizes(), DType::Float32, t.device());
  copy(out, t, true);
  return out;
}

void scaled_mm(const Tensor& out, const Tensor& self, const Tensor& mat2, const Tensor& scale_a,
               const Tensor& scale_b, const Tensor& bias, const Tensor& scale_result,
               std::optional<DType>, bool use_fast_accum) {
  const Launch launch(out.device());
  const DeviceProperties& device = launch.properties();
  check(device.major * 10 + device.minor >= 89, "_scaled_mm: products of ", self.dtype(), " ",
        self.sizes(), " and ", mat2.dtype(), " ", mat2.sizes(),
        " need a GPU of compute capability 8.9 or newer, and ", device.name, " has ", device.major,
        ".", device.minor, "; convert with .to(torch.bfloat16) and use torch.mm");
  if (out.numel() == 0) return;
  const int64_t m = self.sizes()[0], k = self.sizes()[1], n = mat2.sizes()[1];
  const bool library = k > 0 && k % 16 == 0 && n % 16 == 0 &&
                       !(self.dtype() == DType::Float8_e5m2 && mat2.dtype() == DType::Float8_e5m2);
  Tensor a, b;  // b: the rows are mat2's columns
  if (library) {
    a = dense_rows(self) ? self : empty(self.sizes(), self.dtype(), self.device());
    if (!a.is_same(self)) copy(a, self, true);
    const Tensor columns = transposed(mat2);
    b = dense_rows(columns) ? columns : empty(columns.sizes(), mat2.dtype(), mat2.device());
    if (!b.is_same(columns)) copy(b, columns, true);
  }
  const auto product = [&](const Tensor& c, bool scaled) {
    GemmProblem p{.dtype = self.dtype(),
                  .m = m,
                  .n = n,
                  .k = k,
                  .a = {a.data(), a.strides()[0], 0, false},
                  .b = {b.data(), b.strides()[0], 0, true},
                  .c = c.data(),
                  .ldc = n};
    p.float8.b = mat2.dtype();
    p.float8.c = c.dtype();
    p.float8.fast_accumulate = use_fast_accum;
    if (scaled) {
      p.float8.scale_a = scale_a.data_as<float>();
      p.float8.scale_b = scale_b.data_as<float>();
      if (bias.defined()) p.bias = bias.data();
    }
    return cublaslt_gemm(p, {launch.stream(), launch.device()});
  };

  const bool single = scale_a.numel() == 1 && scale_b.numel() == 1;
  const bool bias_fits = !bias.defined() || (bias.dtype() == out.dtype() && out.itemsize() == 2 &&
                                             bias.is_contiguous());
  if (library && single && bias_fits && !is_float8(out.dtype()) && product(out, true)) return;

  const Tensor sums = out.dtype() == DType::Float32
                          ? out
                          : empty(out.sizes(), DType::Float32, out.device());
  if (!library || !product(sums, false))
    kernels_for(DeviceType::CUDA).mm(sums, as_float(self), as_float(mat2));
  const Tensor added = as_float(bias);
  const Finish finish{.sums = sums.data_as<float>(),
                      .out = static_cast<char*>(out.data()),
                      .dtype = out.dtype(),
                      .row_scales = scale_a.data_as<float>(),
                      .column_scales = scale_b.data_as<float>(),
                      .by_row = !single,
                      .by_column = !single,
                      .bias = added.defined() ? added.data_as<float>() : nullptr,
                      .scale_result = scale_result.defined() && is_float8(out.dtype())
                                          ? scale_result.data_as<float>()
                                          : nullptr,
                      .m = m,
                      .n = n};
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(ceil_div<int64_t>(n, kThreads), 64)),
                  static_cast<uint32_t>(std::min<int64_t>(m, 16384)));
  launch(finish_kernel, grid, dim3(kThreads), 0, finish);
}

const RegisterCuda registered([](KernelTable& t) { t._scaled_mm = scaled_mm; });

}  // namespace
}  // namespace vt::cuda
