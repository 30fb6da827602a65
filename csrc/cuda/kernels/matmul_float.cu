// Products of float32 matrices on Hopper's tensor cores, as exact as float32's own
// (tf32_split.cuh). A block computes 128 rows and 64 or 128 columns over tiles of 32 terms. Of its
// three warpgroups one brings tiles into stages of shared memory, where the right operand lies in its
// two parts; the others compute 64 rows each, whose parts they split in registers. A tile's sums are
// added to the result's by ordinary additions.
//
// Long sums of few results are divided among the blocks of a cluster, which add up their parts
// through shared memory, each some of the results; the longest among several clusters, whose parts a
// second kernel adds. Always in order.
#include "cuda/kernels/matmul_float.cuh"

#include <algorithm>
#include <array>
#include <atomic>

#include "core/kernel_switches.h"
#include "cuda/kernels/matmul_float_tiles.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/kernels/warpgroup.cuh"

namespace vt::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kGroup = hopper::kWarpgroup;
constexpr int kProductThreads = 3 * kGroup;
constexpr int kMostInCluster = 8;  // blocks; more are not portable

/// Shared memory of a block of so many columns.
template <int kColumns>
struct ProductShared {
  static constexpr int kRight = kColumns * kRowBytes;  // of either part
  static constexpr int kStage = kLeft + 2 * kRight;
  static constexpr int kBytes = kStages * kStage + 1024 + 2 * kStages * 8;
  /// A row of a part's sums for the cluster, in the place of the stages: so far from the next that
  /// four rows have banks of their own.
  static constexpr int kSumsRow = (kColumns + 8) * 4;
  static_assert(kRows * kSumsRow <= kStages * kStage);
};

struct FloatProblem {
  const float* a;
  const float* b;
  float* c;
  float* parts;  // where the sums are divided among clusters: [cluster][batch][m][n], dense
  const float* bias;
  int m, n, k;
  int64_t a_stride, b_stride, c_stride, a_step, b_step, c_step;
  int terms;  // of a part, a multiple of kTerms
  int tiles_m, tiles_n;
  float alpha, beta;
  bool whole_pieces;  // the result's rows are aligned to 16 bytes, and n a multiple of 4
};

template <bool kLeftTerms, bool kRightTerms, int kColumns>
__device__ __noinline__ void plain_sums(float* sum, const FloatProblem& p, const float* a,
                                        const float* b, int row, int column, int term, int last) {
  const int lane = threadIdx.x % kWarp;
  row += lane / 4;
  column += lane % 4 * 2;
#pragma unroll 1
  for (int j = 0; j < kColumns / 8; ++j) {
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

template <bool kLeftTerms, bool kRightTerms, int kColumns>
__global__ void __launch_bounds__(kProductThreads, 1)
    float_product_kernel(const __grid_constant__ FloatProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = ProductShared<kColumns>;
  constexpr int kStage = Shared::kStage, kRight = Shared::kRight;
  constexpr int kSums = kColumns / 2;  // of a thread
  extern __shared__ char memory[];
  const uint32_t barriers = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t stages = (barriers + 2 * kStages * 8 + 1023) & ~1023u;
  const auto full = [&](int s) { return barriers + s * 8; };
  const auto free = [&](int s) { return barriers + (kStages + s) * 8; };
  const int tile = blockIdx.x % (p.tiles_m * p.tiles_n), part = blockIdx.y;
  const int64_t batch = blockIdx.x / (p.tiles_m * p.tiles_n);
  const int first_row = tile / p.tiles_n * kRows, first_column = tile % p.tiles_n * kColumns;
  const int term = part * p.terms, last = min(term + p.terms, p.k);
  const int tiles = (last - term + kTerms - 1) / kTerms;
  const float* const a = p.a + batch * p.a_step;
  const float* const b = p.b + batch * p.b_step;
  const int group = threadIdx.x / kGroup;
  if (group == 0) {
    hopper::keep_registers<104>();
    LeftTiles<kLeftTerms> left(a, p.a_stride, first_row, p.m, term, last, threadIdx.x);
    RightTiles<kRightTerms, kColumns> right(b, p.b_stride, first_column, p.n, term, last,
                                            threadIdx.x);
    const int whole = first_column + kColumns <= p.n ? (last - term) / kTerms : 0;  // tiles
    right.template load<0>(whole > 0);
    if (tiles > 1) right.template load<1>(whole > 1);
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        hopper::init_barrier(full(s), 2 * kGroup);
        hopper::init_barrier(free(s), 2 * kGroup);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    hopper::barrier_of_warps<kProductThreads>();
    const auto fill = [&]<int kBuffer>(int k) {
      const int s = k % kStages;
      const uint32_t to = stages + s * kStage;
      if (k >= kStages) hopper::wait(free(s), (k / kStages - 1) & 1);
      left.start(to, a);
      hopper::arrive_after_copies(full(s));
      right.template store<kBuffer>(to + kLeft);
      hopper::publish_shared();
      hopper::arrive(full(s));
      if (k + 2 < tiles) right.template load<kBuffer>(whole > k + 2);
    };
    for (int k = 0; k < tiles; k += 2) {
      fill.template operator()<0>(k);
      if (k + 1 < tiles) fill.template operator()<1>(k + 1);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  hopper::take_registers<200>();
  hopper::barrier_of_warps<kProductThreads>();  // the barriers are there
  const int row = (group - 1) * 64 + threadIdx.x % kGroup / kWarp * 16;
  const uint32_t left_start = stages + left_place<kLeftTerms>(row);
  float sum[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] = 0.f;
  const auto read = [&](SplitPart<4>(&x)[4], int k) {
    hopper::wait(full(k % kStages), k / kStages & 1);
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
    const uint64_t high = hopper::descriptor_of(right), low = hopper::descriptor_of(right + kRight);
    float c[kSums];
    hopper::begin_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      hopper::multiply_group(c, x[i].low, high + i * 2, i > 0);
      hopper::multiply_group(c, x[i].high, low + i * 2, 1);
    }
    hopper::commit_products();
    if (k + 1 < tiles) read(next, k + 1);
    hopper::wait_for_products<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) c[i] *= 1.f / kLowScale;
    hopper::begin_products();
#pragma unroll
    for (int i = 0; i < 4; ++i) hopper::multiply_group(c, x[i].high, high + i * 2, 1);
    hopper::commit_products();
    hopper::wait_for_products<0>();
    hopper::arrive(free(k % kStages));
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] += c[i];
  };
  SplitPart<4> even[4], odd[4];
  read(even, 0);
  for (int k = 0; k < tiles; k += 2) {
    use(even, odd, k);
    if (k + 1 < tiles) use(odd, even, k + 1);
  }
  float check = 0.f;
#pragma unroll
  for (int i = 0; i < kSums; ++i) check += sum[i] * 0.f;
  if (__any_sync(0xffffffffu, check != 0.f)) {
    float plain[kSums];
    plain_sums<kLeftTerms, kRightTerms, kColumns>(plain, p, a, b, first_row + row, first_column,
                                                  term, last);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = plain[i];
  }
  const bool divided = p.parts != nullptr;
  const uint32_t blocks = hopper::cluster_blocks();
  const int64_t batches = gridDim.x / (p.tiles_m * p.tiles_n);
  float* const c = divided ? p.parts + (part / blocks * batches + batch) * int64_t{p.m} * p.n
                           : p.c + batch * p.c_step;
  const int64_t stride = divided ? p.n : p.c_stride;
  const int lane = threadIdx.x % kWarp;
  const int own_row = row + lane / 4, own_column = lane % 4 * 2;
  if (blocks == 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = first_row + own_row + r * 8;
      if (at >= p.m) continue;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        float value[2] = {sum[j * 4 + r * 2], sum[j * 4 + r * 2 + 1]};
        store_columns(c + at * stride, first_column + j * 8 + own_column, value, p, divided);
      }
    }
    return;
  }
  // The other warpgroup may still be multiplying what lies where the sums go.
  hopper::meet<1, 2 * kGroup>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t to = stages + (own_row + r * 8) * Shared::kSumsRow + own_column * 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
      store_two(to + j * 32, sum[j * 4 + r * 2], sum[j * 4 + r * 2 + 1]);
  }
  hopper::cluster_meet();
  constexpr int kPieces = kColumns / 4;  // of a row
  for (int i = hopper::cluster_rank() * 2 * kGroup + threadIdx.x - kGroup; i < kRows * kPieces;
       i += blocks * 2 * kGroup) {
    const int at = i / kPieces, column = i % kPieces * 4;
    if (first_row + at >= p.m || first_column + column >= p.n) continue;
    const uint32_t from = stages + at * Shared::kSumsRow + column * 4;
    float value[4] = {};
#pragma unroll 4
    for (uint32_t block = 0; block < blocks; ++block) {
      const float4 v = hopper::load_of_block(from, block);
      value[0] += v.x;
      value[1] += v.y;
      value[2] += v.z;
      value[3] += v.w;
    }
    store_columns(c + (first_row + at) * stride, first_column + column, value, p, divided);
  }
  hopper::cluster_meet();  // until all have read what lies here
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

/// How a product is divided: the columns of a block, among how many blocks its sums, and how many of
/// those are a cluster.
struct Division {
  int columns, parts, cluster;
};

/// How many blocks in clusters of so many run at once on the device: one on a processor, and some
/// processors have no place in a cluster.
int64_t blocks_at_once(const Launch& launch, int cluster) {
  if (cluster <= 2) return launch.properties().multiprocessors;
  static std::array<std::array<std::atomic<int>, kMostInCluster + 1>, kMaxDevices> found{};
  std::atomic<int>& clusters =
      found[static_cast<size_t>(launch.device())][static_cast<size_t>(cluster)];
  if (clusters.load(std::memory_order_relaxed) == 0) {
    const auto kernel = float_product_kernel<true, true, 128>;
    allow_shared_memory(kernel, ProductShared<128>::kBytes);
    cudaLaunchAttribute extents{};
    extents.id = cudaLaunchAttributeClusterDimension;
    extents.val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, static_cast<unsigned>(cluster));
    config.blockDim = dim3(kProductThreads);
    config.dynamicSmemBytes = ProductShared<128>::kBytes;
    config.attrs = &extents;
    config.numAttrs = 1;
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "asking for clusters");
    clusters.store(std::max(count, 1), std::memory_order_relaxed);
  }
  return int64_t{clusters.load(std::memory_order_relaxed)} * cluster;
}

/// The division that is done first, by what its pieces take on an H200, in microseconds: without
/// clusters, in clusters of each size, and in as many of them as run at once.
Division divide(const Launch& launch, const FloatProblem& p, int64_t batch) {
  struct Cost {
    int columns;
    double tile, rest;
  };
  constexpr double kCluster = 1.4, kSecondKernel = 3, kBytes = 4e6;  // the last a microsecond
  constexpr int64_t kMostParts = 64;
  const int64_t tiles = ceil_div(p.k, kTerms);
  const double part_bytes = 4. * static_cast<double>(batch) * p.m * p.n;
  Division best{};
  double least = 0;
  for (const Cost& cost : {Cost{128, 1.34, 6.5}, Cost{64, 0.83, 5.3}}) {
    const int64_t results = batch * ceil_div(p.m, kRows) * ceil_div(p.n, cost.columns);
    for (int cluster = 1; cluster <= kMostInCluster && cluster <= tiles; cluster *= 2) {
      const int64_t at_once = blocks_at_once(launch, cluster);
      const int64_t fill = std::min({at_once / results, tiles, kMostParts}) / cluster * cluster;
      for (const int64_t wanted : {int64_t{cluster}, fill}) {
        if (wanted < cluster) continue;
        const int64_t each = ceil_div(tiles, wanted), parts = ceil_div(tiles, each);
        if (parts % cluster != 0) continue;
        const int64_t clusters = parts / cluster;
        const auto waves = static_cast<double>(ceil_div(results * parts, at_once));
        double time = waves * (cost.rest + static_cast<double>(each) * cost.tile);
        if (cluster > 1) time += kCluster;
        if (clusters > 1)
          time += kSecondKernel + 2 * static_cast<double>(clusters) * part_bytes / kBytes;
        if (least > 0 && time >= least) continue;
        least = time;
        best = {cost.columns, static_cast<int>(parts), cluster};
      }
    }
  }
  return best;
}

template <bool kLeftTerms, bool kRightTerms, int kColumns>
void run(const Launch& launch, FloatProblem p, int64_t batch, const Division& division) {
  p.tiles_m = ceil_div(p.m, kRows);
  p.tiles_n = ceil_div(p.n, kColumns);
  p.terms = ceil_div(ceil_div(p.k, kTerms), division.parts) * kTerms;
  const auto kernel = float_product_kernel<kLeftTerms, kRightTerms, kColumns>;
  constexpr int kBytes = ProductShared<kColumns>::kBytes;
  allow_shared_memory(kernel, kBytes);
  const int64_t tiles = int64_t{p.tiles_m} * p.tiles_n * batch;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(division.parts));
  const dim3 cluster(1, static_cast<unsigned>(division.cluster));
  const int clusters = division.parts / division.cluster;
  if (clusters == 1) {
    launch.in_clusters(kernel, grid, cluster, dim3(kProductThreads), kBytes, p);
    return;
  }
  const int64_t size = batch * p.m * p.n;
  const Scratch scratch(static_cast<size_t>(size * clusters) * sizeof(float), launch);
  p.parts = scratch.data<float>();
  launch.in_clusters(kernel, grid, cluster, dim3(kProductThreads), kBytes, p);
  const int64_t pieces = p.whole_pieces ? size / 4 : size;
  launch(p.whole_pieces ? add_parts<4> : add_parts<1>,
         dim3(static_cast<unsigned>(launch.fill(ceil_div<int64_t>(pieces, 256), 256))), dim3(256),
         0, p, clusters, batch);
}

template <bool kLeftTerms, bool kRightTerms>
void run(const Launch& launch, const FloatProblem& p, int64_t batch) {
  const Division d = divide(launch, p, batch);
  if (d.columns == 64)
    run<kLeftTerms, kRightTerms, 64>(launch, p, batch, d);
  else
    run<kLeftTerms, kRightTerms, 128>(launch, p, batch, d);
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
