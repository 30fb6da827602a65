// Cross entropy of rows of few classes, such as an alphabet's: a block takes 32 rows through shared
// memory, so that they are read and written in pieces of 16 bytes however odd their length; 8 threads
// share a row. Eager's losses and the op that gives loss and gradient together share the sums.
#include <limits>

#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda::cross_entropy {
namespace {

constexpr int kTileRows = 32, kLanes = 8;  // of a row
constexpr int kThreads = kTileRows * kLanes;
constexpr int64_t kTileBytes = 32 << 10;

/// A value of each of a row's lanes as one.
template <class T, class Op>
__device__ inline T over_lanes(T value, Op op) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

/// The rows of a block, in shared memory.
template <class S>
struct Tile {
  static constexpr int W = 16 / static_cast<int>(sizeof(S));
  S* rows;
  int64_t first;  // row
  int count;      // elements

  __device__ Tile(uint4* shared, const Problem<Compute<S>>& p)
      : rows(reinterpret_cast<S*>(shared)), first(int64_t{blockIdx.x} * kTileRows),
        count(static_cast<int>(p.classes * min(int64_t{kTileRows}, p.rows - first))) {}

  __device__ void load(const S* from) const { copy(rows, from); }
  __device__ void store(S* to) const { copy(to, rows); }

 private:
  __device__ void copy(S* to, const S* from) const {
    const int t = static_cast<int>(threadIdx.x);
    for (int i = t; i < count / W; i += kThreads)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    for (int i = count / W * W + t; i < count; i += kThreads) to[i] = from[i];
  }
};

/// What a row's lanes find: its log-sum-exp and the sums that label smoothing needs.
template <class S>
struct RowSums {
  using T = Compute<S>;
  T lse, along = T(0), all_weights = T(0);

  __device__ RowSums(const S* x, int classes, int lane, const Problem<T>& p) {
    T top = minus_infinity<T>(), total = T(0);
    for (int i = lane; i < classes; i += kLanes) top = Larger()(top, convert<T>(x[i]));
    top = over_lanes(top, Larger());
    const T by = OnlineSum<T>::shift(top);
    const bool smooth = p.smoothing != T(0);
    for (int i = lane; i < classes; i += kLanes) {
      const T value = convert<T>(x[i]), weight = smooth && p.weight ? p.weight[i] : T(1);
      total += exp_of(value - by);
      along = times_plus(value, weight, along);
      all_weights += weight;
    }
    total = over_lanes(total, Plus());
    if (smooth) along = over_lanes(along, Plus()), all_weights = over_lanes(all_weights, Plus());
    lse = top + log_of(total);
  }
};

/// losses, weights, lses, each `rows`: of every row, 0 for ignored ones.
template <class S>
__global__ void __launch_bounds__(kThreads)
    losses_of_rows(Compute<S>* losses, Compute<S>* weights, Compute<S>* lses, const S* in,
                   Problem<Compute<S>> p) {
  using T = Compute<S>;
  extern __shared__ uint4 pieces[];
  const Tile<S> tile(pieces, p);
  const int t = static_cast<int>(threadIdx.x), classes = static_cast<int>(p.classes);
  const int64_t row = tile.first + t / kLanes;
  const bool there = row < p.rows;
  const int64_t target = there ? p.targets[row] : p.ignored;
  const bool kept = target != p.ignored;
  if (kept && (target < 0 || target >= p.classes))
    stop_kernel(p.failure, FailedCheck::CrossEntropy, target, p.classes);
  tile.load(in + tile.first * classes);
  __syncthreads();
  const S* const x = tile.rows + t / kLanes * classes;
  const RowSums<S> sums(x, there ? classes : 0, t % kLanes, p);
  if (!there || t % kLanes != 0) return;
  const T weight = !kept ? T(0) : p.weight ? p.weight[target] : T(1);
  losses[row] = kept ? row_loss(p, weight, sums.all_weights, sums.lse, convert<T>(x[target]), sums.along)
                     : T(0);
  weights[row] = weight;
  lses[row] = kept ? sums.lse : T(0);
}

template <class S>
__global__ void __launch_bounds__(kThreads) losses_and_gradients(const __grid_constant__ Rows<S> r) {
  using T = Compute<S>;
  extern __shared__ uint4 pieces[];
  const Problem<T>& p = r.problem;
  const Tile<S> tile(pieces, p);
  const int t = static_cast<int>(threadIdx.x), lane = t % kLanes, classes = static_cast<int>(p.classes);
  const int64_t row = tile.first + t / kLanes;
  const bool there = row < p.rows;
  const int64_t target = there ? p.targets[row] : p.ignored;
  const bool kept = target != p.ignored;
  const T scale = there ? r.scale(row) : T(0);
  tile.load(r.in + tile.first * classes);
  __syncthreads();
  S* const x = tile.rows + t / kLanes * classes;
  const int n = there ? classes : 0;
  const RowSums<S> sums(x, n, lane, p);
  const T weight = kept && p.weight ? p.weight[target] : T(1);
  const T at_target = kept ? convert<T>(x[target]) : T(0);
  __syncwarp();  // the target's logit has been read
  const RowGradient<T> g(p, weight, sums.all_weights, scale);
  for (int i = lane; i < n; i += kLanes)
    x[i] = convert<S>(kept ? g.of(p, convert<T>(x[i]), sums.lse, i, target) : T(0));
  if (there && lane == 0)
    r.losses[row] = kept ? row_loss(p, weight, sums.all_weights, sums.lse, at_target, sums.along) : T(0);
  __syncthreads();
  tile.store(r.out + tile.first * classes);
}

/// Blocks and bytes of shared memory; false where a tile does not fit.
template <class S>
struct TileLaunch {
  dim3 blocks;
  size_t bytes;
  bool fits;

  explicit TileLaunch(const Problem<Compute<S>>& p) {
    const int64_t count = ceil_div<int64_t>(p.rows, kTileRows);
    const int64_t most = kTileBytes / (kTileRows * int64_t{sizeof(S)});  // classes
    fits = p.rows > 0 && p.classes > 0 && p.classes <= most && count <= std::numeric_limits<int>::max();
    blocks = dim3(static_cast<unsigned>(count));
    bytes = static_cast<size_t>(p.classes * kTileRows) * sizeof(S);
  }
};

}  // namespace

template <class S>
bool tiled_losses(const Launch& launch, Compute<S>* losses, Compute<S>* weights, Compute<S>* lses,
                  const S* in, const Problem<Compute<S>>& problem) {
  const TileLaunch<S> shape(problem);
  if (!shape.fits || !is_aligned(in)) return false;
  launch(losses_of_rows<S>, shape.blocks, dim3(kThreads), shape.bytes, losses, weights, lses, in, problem);
  return true;
}

template <class S>
bool tiled_gradients(const Launch& launch, const Rows<S>& rows) {
  const TileLaunch<S> shape(rows.problem);
  if (!shape.fits || !is_aligned(rows.in) || !is_aligned(rows.out)) return false;
  launch(losses_and_gradients<S>, shape.blocks, dim3(kThreads), shape.bytes, rows);
  return true;
}

#define VT_TILED(S)                                                                                  \
  template bool tiled_losses<S>(const Launch&, Compute<S>*, Compute<S>*, Compute<S>*, const S*,      \
                                const Problem<Compute<S>>&);                                         \
  template bool tiled_gradients<S>(const Launch&, const Rows<S>&);
VT_TILED(float)
VT_TILED(double)
VT_TILED(__half)
VT_TILED(__nv_bfloat16)
#undef VT_TILED

}  // namespace vt::cuda::cross_entropy
