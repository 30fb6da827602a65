#include "cuda/kernels/matmul_small.cuh"

#include <algorithm>

#include "cuda/kernels/element.cuh"

namespace vt::cuda {
namespace {

constexpr int kSide = 16;      // a block computes 16 x 16 elements, one a thread
constexpr int kThreads = 256;  // kSide * kSide

/// 16 lines of an operand (rows of a, columns of b) over a stretch of k, on their way from global
/// to shared memory. Neighbouring threads read what is neighbouring in memory.
template <class S, class A>
struct Panel {
  static constexpr int kDepth = 256 / sizeof(A);   // of k
  static constexpr int kVector = 16 / sizeof(A);   // elements of one shared access
  static constexpr int kPitch = kDepth + kVector;  // keeps the lines of such accesses on other banks
  static constexpr int kLoads = kSide * kDepth / kThreads;

  const S* data;  // of line 0
  int64_t line_stride, depth_stride;
  int lines, depth;
  bool along_depth;
  A held[kLoads];

  __device__ int line(int i) const {
    const int at = threadIdx.x + i * kThreads;
    return along_depth ? at / kDepth : at % kSide;
  }
  __device__ int step(int i) const {
    const int at = threadIdx.x + i * kThreads;
    return along_depth ? at % kDepth : at / kSide;
  }
  __device__ void load(int from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int l = line(i), d = from + step(i);
      held[i] = l < lines && d < depth ? convert<A>(data[l * line_stride + d * depth_stride]) : A(0);
    }
  }
  __device__ void store(A* tile) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) tile[line(i) * kPitch + step(i)] = held[i];
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    small_product_kernel(const __grid_constant__ SmallProduct p) {
  using A = Compute<S>;
  using P = Panel<S, A>;
  __shared__ alignas(16) A a_tile[kSide * P::kPitch];
  __shared__ alignas(16) A b_tile[kSide * P::kPitch];
  const int64_t first_row = int64_t{blockIdx.y} * kSide, first_column = int64_t{blockIdx.x} * kSide;
  const int64_t z = blockIdx.z;
  const int k = static_cast<int>(p.k);
  P a{static_cast<const S*>(p.a) + z * p.a_step + first_row * p.a_row,
      p.a_row,
      p.a_column,
      static_cast<int>(min(p.m - first_row, int64_t{kSide})),
      k,
      p.a_column == 1};
  P b{static_cast<const S*>(p.b) + z * p.b_step + first_column * p.b_column,
      p.b_column,
      p.b_row,
      static_cast<int>(min(p.n - first_column, int64_t{kSide})),
      k,
      p.b_row == 1};
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  A sums[P::kVector] = {};
  a.load(0);
  b.load(0);
  for (int from = 0; from < k; from += P::kDepth) {
    if (from > 0) __syncthreads();
    a.store(a_tile);
    b.store(b_tile);
    __syncthreads();
    if (from + P::kDepth < k) {  // on their way while the tiles are multiplied
      a.load(from + P::kDepth);
      b.load(from + P::kDepth);
    }
    using V = Vector<A, P::kVector>;
    const V* a_line = reinterpret_cast<const V*>(a_tile + y * P::kPitch);
    const V* b_line = reinterpret_cast<const V*>(b_tile + x * P::kPitch);
#pragma unroll
    for (int d = 0; d < P::kDepth / P::kVector; ++d) {
      const V u = a_line[d], v = b_line[d];
#pragma unroll
      for (int i = 0; i < P::kVector; ++i) sums[i] += u.value[i] * v.value[i];
    }
  }
  if (y >= a.lines || x >= b.lines) return;
  A sum = 0;
#pragma unroll
  for (int i = 0; i < P::kVector; ++i) sum += sums[i];
  const int64_t row = first_row + y, column = first_column + x;
  A result = static_cast<A>(p.alpha) * sum;
  if (p.beta != 0) {
    const S* c = static_cast<const S*>(p.c) + z * p.c_step + row * p.c_row + column * p.c_column;
    result += static_cast<A>(p.beta) * convert<A>(*c);
  }
  if (p.bias) result += convert<A>(static_cast<const S*>(p.bias)[column]);
  static_cast<S*>(p.out)[z * p.out_step + row * p.out_row + column] = convert<S>(result);
}

// Up to here the kernel takes no longer than the library's on an H100 (float32), or little longer
// where the library has tensor cores (16-bit floats, float64); the launch is 4 us cheaper.
// A step is a block's walk over one stretch of k.
constexpr int64_t kMaxSteps = 128, kMaxDepth = 128;
constexpr int64_t kMaxStepsFloat32 = 512, kMaxDepthFloat32 = 256;
constexpr int64_t kMaxBatch = 65535;

}  // namespace

bool is_small_product(DType dtype, int64_t batch, int64_t m, int64_t n, int64_t k) {
  const bool plain = dtype == DType::Float32;
  if (k > (plain ? kMaxDepthFloat32 : kMaxDepth) || batch > kMaxBatch || m > 8192 || n > 8192)
    return false;
  const int64_t depth = dtype == DType::Float64 ? 32 : 64;
  const int64_t steps = batch * ceil_div<int64_t>(m, kSide) * ceil_div<int64_t>(n, kSide) *
                        std::max<int64_t>(ceil_div(k, depth), 1);
  return steps <= (plain ? kMaxStepsFloat32 : kMaxSteps);
}

void small_product(const Launch& launch, DType dtype, const SmallProduct& p) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.n, kSide)),
                  static_cast<unsigned>(ceil_div<int64_t>(p.m, kSide)),
                  static_cast<unsigned>(p.batch));
  visit_float_storage(dtype, [&]<class S>() {
    launch(small_product_kernel<S>, grid, dim3(kThreads), 0, p);
  });
}

}  // namespace vt::cuda
