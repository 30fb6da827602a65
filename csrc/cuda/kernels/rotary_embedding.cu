// Rotary position embedding: pairs of features turned by position-dependent angles.
// Source: Su et al., "RoFormer", 2021.
#include "cuda/kernels/rows.cuh"

namespace vt::cuda {
namespace {

constexpr int kMaxTableDims = 8;
constexpr int kThreads = 256;

/// Which row of cos and sin a row of the input uses: leading dimensions broadcast.
struct TableRows {
  int ndim = 0;
  int64_t extent[kMaxTableDims], step[kMaxTableDims];  // the first is the innermost

  __device__ int64_t of(int64_t row) const {
    int64_t at = 0;
    for (int d = 0; d < ndim; ++d) {
      at += row % extent[d] * step[d];
      row /= extent[d];
    }
    return at;
  }
};

/// False where the broadcast has more alternating dimensions than the table holds.
bool table_rows(IntSpan sizes, IntSpan table_sizes, TableRows& out) {
  const auto n = static_cast<int64_t>(sizes.size()), m = static_cast<int64_t>(table_sizes.size());
  int64_t step = 1;
  for (int64_t d = n - 2; d >= 0; --d) {
    const int64_t at = d - (n - m), extent = at < 0 ? 1 : table_sizes[at];
    const int64_t here = extent == 1 ? 0 : step;
    step *= extent;
    if (sizes[d] == 1) continue;
    const int last = out.ndim - 1;
    if (last >= 0 && here == out.step[last] * out.extent[last]) {
      out.extent[last] *= sizes[d];  // one walk with the dimension inside (both may stand still)
      continue;
    }
    if (out.ndim == kMaxTableDims) return false;
    out.extent[out.ndim] = sizes[d];
    out.step[out.ndim++] = here;
  }
  return true;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    rotate(S* out, const S* in, const char* cos, const char* sin, DType table_dtype, int table_size,
           const __grid_constant__ TableRows rows, int64_t pairs, int64_t half, bool interleaved) {
  using T = Compute<S>;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pairs; i += stride) {
    const int64_t row = i / half, feature = i - row * half;
    const int64_t at = (rows.of(row) * half + feature) * table_size;
    const T c = load_as<T>(cos + at, table_dtype), s = load_as<T>(sin + at, table_dtype);
    const int64_t first = row * 2 * half + (interleaved ? 2 * feature : feature);
    const int64_t second = first + (interleaved ? 1 : half);
    const T a = convert<T>(in[first]), b = convert<T>(in[second]);
    out[first] = convert<S>(a * c - b * s);
    out[second] = convert<S>(b * c + a * s);
  }
}

void rotary_embedding(const Tensor& out, const Tensor& self, const Tensor& cos, const Tensor& sin,
                      bool interleaved) {
  if (self.numel() == 0) return;
  const Launch launch(self.device());
  const int64_t half = self.size(-1) / 2, pairs = self.numel() / 2;
  const Tensor x = dense(self);
  Tensor c = dense(cos), s = dense_as(sin, cos.dtype());
  TableRows rows;
  if (!table_rows(self.sizes(), c.sizes(), rows)) {
    Dims full(self.sizes());
    full.back() = half;
    const auto widen = [&](const Tensor& t) {
      const Tensor wide = empty(full, t.dtype(), t.device());
      copy(wide, t, true);
      return wide;
    };
    c = widen(c);
    s = widen(s);
    rows = TableRows();
    table_rows(self.sizes(), full, rows);
  }
  visit_float_storage(self.dtype(), [&]<class S>() {
    launch(rotate<S>,
           dim3(static_cast<unsigned>(launch.fill(ceil_div<int64_t>(pairs, kThreads), kThreads, 8))),
           dim3(kThreads), 0, out.data_as<S>(), x.data_as<S>(), static_cast<const char*>(c.data()),
           static_cast<const char*>(s.data()), c.dtype(), static_cast<int>(c.itemsize()), rows,
           pairs, half, interleaved);
  });
}

const RegisterCuda registered([](KernelTable& t) { t.rotary_embedding = rotary_embedding; });

}  // namespace
}  // namespace vt::cuda
