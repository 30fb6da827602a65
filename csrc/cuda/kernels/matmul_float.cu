// Products of float32 matrices on Hopper's tensor cores, as exact as float32's own
// (tf32_split.cuh). A block computes 128 rows and 128 columns over tiles of 32 terms. Of its three
// warpgroups one brings tiles into stages of shared memory, where the right operand lies in its two
// parts; the others compute 64 rows each, whose parts they split in registers. A tile's sums are
// added to the result's by ordinary additions. Long sums of few results are divided among blocks,
// whose parts a second kernel adds in order.
#include "cuda/kernels/matmul_float.cuh"

#include <algorithm>

#include "core/kernel_switches.h"
#include "cuda/kernels/matmul_float_tiles.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/kernels/warpgroup.cuh"

namespace vt::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kStage = kLeft + 2 * kRight;
constexpr int kGroup = 128;  // threads
constexpr int kProductThreads = 3 * kGroup;
constexpr int kProductBytes = kStages * kStage + 1024 + 2 * kStages * 8;

struct FloatProblem {
  const float* a;
  const float* b;
  float* c;
  float* parts;  // where the sums are divided: [part][batch][m][n], dense
  const float* bias;
  int m, n, k;
  int64_t a_stride, b_stride, c_stride, a_step, b_step, c_step;
  int terms;  // of a part, a multiple of kTerms
  int tiles_m, tiles_n;
  float alpha, beta;
  bool whole_pieces;  // the result's rows are aligned to 16 bytes, and n a multiple of 4
};

template <bool kLeftTerms, bool kRightTerms>
__device__ __noinline__ void plain_sums(float* sum, const FloatProblem& p, const float* a,
                                        const float* b, int row, int column, int term, int last) {
  const int lane = threadIdx.x % kWarp;
  row += lane / 4;
  column += lane % 4 * 2;
#pragma unroll 1
  for (int j = 0; j < 16; ++j) {
    float s[4] = {};
#pragma unroll 4
    for (int k = term; k < last; ++k) {
      float x[2], y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = row + e * 8, c = column + j * 8 + e;
        x[e] = r < p.m ? a[kLeftTerms ? r * p.a_stride + k : k * p.a_stride + r] : 0.f;
        y[e] = c < p.n ? b[kRightTerms ? c * p.b_stride + k : k * p.b_stride + c] : 0.f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) s[e] += x[e / 2] * y[e % 2];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[j * 4 + e] = s[e];
  }
}

template <int kWide>
__device__ inline void store_columns(float* row, int n, float (&value)[kWide],
                                     const FloatProblem& p, bool part) {
  if (n >= p.n) return;
  if (!part) {
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      value[w] *= p.alpha;
      if (n + w >= p.n) continue;
      if (p.beta != 0.f) value[w] += p.beta * row[n + w];
      if (p.bias) value[w] += p.bias[n + w];
    }
  }
  if (p.whole_pieces) {
    Vector<float, kWide> piece;
#pragma unroll
    for (int w = 0; w < kWide; ++w) piece.value[w] = value[w];
    *reinterpret_cast<Vector<float, kWide>*>(row + n) = piece;
    return;
  }
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
    if (n + w < p.n) row[n + w] = value[w];
  }
}

template <bool kLeftTerms, bool kRightTerms>
__global__ void __launch_bounds__(kProductThreads, 1)
    float_product_kernel(const __grid_constant__ FloatProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  const uint32_t barriers = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t stages = (barriers + 2 * kStages * 8 + 1023) & ~1023u;
  const auto full = [&](int s) { return barriers + s * 8; };
  const auto free = [&](int s) { return barriers + (kStages + s) * 8; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), 2 * kGroup);
      barrier_init(free(s), 2 * kGroup);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int tile = blockIdx.x % (p.tiles_m * p.tiles_n), part = blockIdx.y;
  const int64_t batch = blockIdx.x / (p.tiles_m * p.tiles_n);
  const int first_row = tile / p.tiles_n * kRows, first_column = tile % p.tiles_n * kColumns;
  const int term = part * p.terms, last = min(term + p.terms, p.k);
  const int tiles = (last - term + kTerms - 1) / kTerms;
  const float* const a = p.a + batch * p.a_step;
  const float* const b = p.b + batch * p.b_step;
  const int group = threadIdx.x / kGroup;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
    LeftTiles<kLeftTerms> left(a, p.a_stride, first_row, p.m, term, last, threadIdx.x);
    RightTiles<kRightTerms> right(b, p.b_stride, first_column, p.n, term, last, threadIdx.x);
    const int whole = first_column + kColumns <= p.n ? (last - term) / kTerms : 0;  // tiles
    right.template load<0>(whole > 0);
    if (tiles > 1) right.template load<1>(whole > 1);
    const auto fill = [&]<int kBuffer>(int k) {
      const int s = k % kStages;
      const uint32_t to = stages + s * kStage;
      if (k >= kStages) barrier_wait(free(s), (k / kStages - 1) & 1);
      left.start(to, a);
      barrier_arrive_after_copies(full(s));
      right.template store<kBuffer>(to + kLeft);
      publish_to_products();
      barrier_arrive(full(s));
      if (k + 2 < tiles) right.template load<kBuffer>(whole > k + 2);
    };
    for (int k = 0; k < tiles; k += 2) {
      fill.template operator()<0>(k);
      if (k + 1 < tiles) fill.template operator()<1>(k + 1);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
  const int row = (group - 1) * 64 + threadIdx.x % kGroup / kWarp * 16;
  const uint32_t left_start = stages + left_place<kLeftTerms>(row);
  float sum[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = 0.f;
  const auto read = [&](SplitPart<4>(&x)[4], int k) {
    barrier_wait(full(k % kStages), k / kStages & 1);
    float from[4][4];
    read_left<kLeftTerms>(from, left_start + k % kStages * kStage);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j].set(i, from[j][i]);
    }
  };
  // A tile's rows are read and split while the small terms of the last are on their way.
  const auto use = [&](const SplitPart<4>(&x)[4], SplitPart<4>(&next)[4], int k) {
    const uint32_t right = stages + k % kStages * kStage + kLeft;
    const uint64_t high = descriptor_of(right), low = descriptor_of(right + kRight);
    float c[64];
    group_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_group(c, x[i].low, high + i * 2, i > 0);
      multiply_group(c, x[i].high, low + i * 2, 1);
    }
    group_commit();
    if (k + 1 < tiles) read(next, k + 1);
    group_wait();
#pragma unroll
    for (int i = 0; i < 64; ++i) c[i] *= 1.f / kLowScale;
    group_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_group(c, x[i].high, high + i * 2, 1);
    group_commit();
    group_wait();
    barrier_arrive(free(k % kStages));
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] += c[i];
  };
  SplitPart<4> even[4], odd[4];
  read(even, 0);
  for (int k = 0; k < tiles; k += 2) {
    use(even, odd, k);
    if (k + 1 < tiles) use(odd, even, k + 1);
  }
  float check = 0.f;
#pragma unroll
  for (int i = 0; i < 64; ++i) check += sum[i] * 0.f;
  if (__any_sync(0xffffffffu, check != 0.f)) {
    float plain[64];
    plain_sums<kLeftTerms, kRightTerms>(plain, p, a, b, first_row + row, first_column, term, last);
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = plain[i];
  }
  const bool divided = p.parts != nullptr;
  float* const c = divided ? p.parts + (part * (gridDim.x / (p.tiles_m * p.tiles_n)) + batch) *
                                           int64_t{p.m} * p.n
                           : p.c + batch * p.c_step;
  const int64_t stride = divided ? p.n : p.c_stride;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = first_row + row + lane / 4 + r * 8;
    if (at >= p.m) continue;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float value[2] = {sum[j * 4 + r * 2], sum[j * 4 + r * 2 + 1]};
      store_columns(c + at * stride, first_column + j * 8 + lane % 4 * 2, value, p, divided);
    }
  }
#endif
}

template <int kWide>
__global__ void __launch_bounds__(256)
    add_parts(const __grid_constant__ FloatProblem p, int parts, int64_t batch) {
  using Piece = Vector<float, kWide>;
  const int64_t columns = p.n / kWide, pieces = batch * p.m * columns;
  const auto* const from = reinterpret_cast<const Piece*>(p.parts);
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < pieces;
       i += int64_t{gridDim.x} * 256) {
    float sum[kWide] = {};
#pragma unroll 8
    for (int part = 0; part < parts; ++part) {
      const Piece piece = from[part * pieces + i];
#pragma unroll
      for (int w = 0; w < kWide; ++w) sum[w] += piece.value[w];
    }
    const int64_t row = i / columns % p.m, z = i / columns / p.m;
    store_columns(p.c + z * p.c_step + row * p.c_stride, static_cast<int>(i % columns) * kWide, sum,
                  p, false);
  }
}

template <bool kLeftTerms, bool kRightTerms>
void run(const Launch& launch, FloatProblem p, int64_t batch) {
  p.tiles_m = ceil_div(p.m, kRows);
  p.tiles_n = ceil_div(p.n, kColumns);
  const int64_t tiles = int64_t{p.tiles_m} * p.tiles_n * batch;
  // As many blocks as run at once, four tiles of terms or more in each.
  const int64_t most =
      std::min<int64_t>({launch.properties().multiprocessors / tiles, p.k / (4 * kTerms), 64});
  p.terms = static_cast<int>(ceil_div<int64_t>(ceil_div(p.k, kTerms), std::max<int64_t>(most, 1))) *
            kTerms;
  const int parts = ceil_div(p.k, p.terms);
  const auto kernel = float_product_kernel<kLeftTerms, kRightTerms>;
  allow_shared_memory(kernel, kProductBytes);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts));
  if (parts == 1) {
    launch(kernel, grid, dim3(kProductThreads), kProductBytes, p);
    return;
  }
  const int64_t size = batch * p.m * p.n;
  const Scratch scratch(static_cast<size_t>(size * parts) * sizeof(float), launch);
  p.parts = scratch.data<float>();
  launch(kernel, grid, dim3(kProductThreads), kProductBytes, p);
  const int64_t pieces = p.whole_pieces ? size / 4 : size;
  launch(p.whole_pieces ? add_parts<4> : add_parts<1>,
         dim3(static_cast<unsigned>(launch.fill(ceil_div<int64_t>(pieces, 256), 256))), dim3(256),
         0, p, parts, batch);
}

bool in_fours(const GemmOperand& o) {
  return is_aligned(o.data) && o.ld % 4 == 0 && o.step % 4 == 0;
}

/// Where it was measured to be faster than the library's products.
bool is_faster(const GemmProblem& g) {
  constexpr double kWork = 1 << 26;
  return static_cast<double>(g.batch) * static_cast<double>(g.m) * static_cast<double>(g.n) *
                 static_cast<double>(g.k) >=
             kWork &&
         g.m >= 32 && g.n >= 32 && g.k >= 32;
}

}  // namespace

bool float_product(const Launch& launch, const GemmProblem& g) {
  const DeviceProperties& device = launch.properties();
  if (g.dtype != DType::Float32 || device.major != 9 || device.minor != 0 ||
      g.epilogue != GemmEpilogue::None || kernel_switch(KernelSwitch::MatmulTf32) || !is_faster(g) || !in_fours(g.a) ||
      !in_fours(g.b) || std::max({g.m, g.n, g.k}) >= (int64_t{1} << 30))
    return false;
  FloatProblem p{};
  p.a = static_cast<const float*>(g.a.data);
  p.b = static_cast<const float*>(g.b.data);
  p.c = static_cast<float*>(g.c);
  p.bias = static_cast<const float*>(g.bias);
  p.m = static_cast<int>(g.m);
  p.n = static_cast<int>(g.n);
  p.k = static_cast<int>(g.k);
  p.a_stride = g.a.ld;
  p.b_stride = g.b.ld;
  p.c_stride = g.ldc;
  p.a_step = g.a.step;
  p.b_step = g.b.step;
  p.c_step = g.step_c;
  p.alpha = static_cast<float>(g.alpha);
  p.beta = static_cast<float>(g.beta);
  p.whole_pieces = p.n % 4 == 0 && g.ldc % 4 == 0 && g.step_c % 4 == 0 && is_aligned(g.c);
  if (g.a.transposed) {
    g.b.transposed ? run<false, true>(launch, p, g.batch) : run<false, false>(launch, p, g.batch);
  } else {
    g.b.transposed ? run<true, true>(launch, p, g.batch) : run<true, false>(launch, p, g.batch);
  }
  return true;
}

}  // namespace vt::cuda
