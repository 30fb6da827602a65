// A tile of up to 32 sorted positions is summed by the threads that share its columns. A run of equal
// keys inside one tile is written at once; a run over several tiles leaves a part in each, and a
// second launch adds the parts, first to last.
#include "cuda/kernels/add_rows.cuh"

#include <bit>

#include "cuda/kernels/loops.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kThreads = 128, kMostTile = 32, kAhead = 4;

/// How many positions have `key`.
__device__ int64_t count_of(const SortedIndex& index, int64_t key) {
  int64_t bounds[2];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    int64_t low = 0, high = index.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index.key(middle) < key + upper)
        low = middle + 1;
      else
        high = middle;
    }
    bounds[upper] = low;
  }
  return bounds[1] - bounds[0];
}

/// V columns of one row's sum. S void: elements of any dtype.
template <class S, class T, int V>
__device__ void write_sum(const RowSums& s, T scale, int64_t o, int64_t key, int64_t column,
                          const T (&sum)[V]) {
  if (key == s.skip) return;
  T factor = scale;
  if (s.divide_by_count) factor = factor / static_cast<T>(count_of(s.index, key));
  const int64_t at = (o * s.length + key) * s.inner + column;
  if constexpr (std::is_void_v<S>) {
    char* to = s.target + at * s.size;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const T before = s.accumulate ? load_as<T>(to + k * s.size, s.dtype) : T(0);
      store_as<T>(to + k * s.size, s.dtype, before + factor * sum[k]);
    }
  } else {
    auto* const to = reinterpret_cast<Vector<S, V>*>(s.target + at * sizeof(S));
    Vector<S, V> row;
    if (s.accumulate) row = *to;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const T before = s.accumulate ? convert<T>(row.value[k]) : T(0);
      row.value[k] = convert<S>(before + factor * sum[k]);
    }
    *to = row;
  }
}

/// V columns of one row. S void: elements of any dtype.
template <class S, class T, int V>
__device__ inline void load_row(const RowSums& s, int64_t o, int64_t rows, uint32_t position,
                                int64_t column, T (&values)[V]) {
  const int64_t at = (o * rows + position) * s.inner + column;
  if constexpr (std::is_void_v<S>) {
    values[0] = load_as<T>(s.source + at * s.size, s.dtype);
  } else {
    const auto loaded = *reinterpret_cast<const Vector<S, V>*>(s.source + at * sizeof(S));
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = convert<T>(loaded.value[k]);
  }
}

/// `parts`: for every (outer, tile) two rows of sums: of a run that began before the tile, and of
/// one that goes on after it.
template <class S, class T, int V>
__global__ void __launch_bounds__(kThreads)
    sum_tiles(const __grid_constant__ RowSums s, T scale, T* parts, int across, int size) {
  const int64_t column = (int64_t{blockIdx.x} * across + threadIdx.x % across) * V;
  if (column >= s.inner) return;
  const int64_t n = s.index.n, tiles = (n + size - 1) / size;
  const int64_t step = int64_t{gridDim.y} * (kThreads / across);
  for (int64_t job = int64_t{blockIdx.y} * (kThreads / across) + threadIdx.x / across;
       job < s.outer * tiles; job += step) {
    const int64_t o = job / tiles, tile = job % tiles;
    const int64_t first = tile * size, last = min(first + size, n);
    int64_t key = s.index.key(first);
    bool began = first == 0 || s.index.key(first - 1) != key;
    T sum[V] = {};
    for (int64_t i = first; i < last; i += kAhead) {
      T values[kAhead][V];
      int64_t keys[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (i + u >= last) break;
        keys[u] = s.index.key(i + u);
        load_row<S, T, V>(s, o, n, s.index.positions[i + u], column, values[u]);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (i + u >= last) break;
        if (keys[u] != key) {
          if (began) {
            write_sum<S, T, V>(s, scale, o, key, column, sum);
          } else {
            T* part = parts + job * 2 * s.inner + column;
#pragma unroll
            for (int k = 0; k < V; ++k) part[k] = sum[k];
          }
          key = keys[u];
          began = true;
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] = T(0);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += values[u][k];
      }
    }
    const bool ends = last == n || s.index.key(last) != key;
    if (began && ends) {
      write_sum<S, T, V>(s, scale, o, key, column, sum);
    } else {
      T* part = parts + (job * 2 + (began ? 1 : 0)) * s.inner + column;
#pragma unroll
      for (int k = 0; k < V; ++k) part[k] = sum[k];
    }
  }
}

/// Adds the parts of runs that begin in a tile and go on after it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    join_tiles(const __grid_constant__ RowSums s, T scale, const T* parts, int across, int size) {
  const int64_t column = int64_t{blockIdx.x} * across + threadIdx.x % across;
  if (column >= s.inner) return;
  const int64_t n = s.index.n, tiles = (n + size - 1) / size;
  const int64_t step = int64_t{gridDim.y} * (kThreads / across);
  for (int64_t job = int64_t{blockIdx.y} * (kThreads / across) + threadIdx.x / across;
       job < s.outer * tiles; job += step) {
    const int64_t o = job / tiles, tile = job % tiles;
    const int64_t first = tile * size, next = first + size;
    if (next >= n) continue;
    const int64_t key = s.index.key(next - 1);
    if (s.index.key(next) != key) continue;
    if (first > 0 && s.index.key(first - 1) == key) continue;  // began before
    T sum[1] = {parts[(job * 2 + 1) * s.inner + column]};
    // Whether the run reaches into tile t, and on into the next one.
    for (int64_t t = tile + 1; t < tiles && s.index.key(t * size) == key; ++t)
      sum[0] += parts[(o * tiles + t) * 2 * s.inner + column];
    write_sum<void, T, 1>(s, scale, o, key, column, sum);
  }
}

/// Positions of a tile: fewer where there are not enough tiles for the device, as long as a key's
/// rows fall into few of them on average.
int tile_of(const Launch& launch, const RowSums& s, int64_t columns) {
  int size = kMostTile;
  const int64_t wanted = int64_t{1024} * launch.properties().multiprocessors;  // threads
  // Of indices into a dimension of no elements the device tells.
  const int64_t length = std::max<int64_t>(s.length, 1);
  while (size > kAhead && size / 2 >= s.index.n / length &&
         ceil_div<int64_t>(s.index.n, size) * s.outer * columns < wanted)
    size /= 2;
  return size;
}

template <class S, class T, int V>
void run(const Launch& launch, const RowSums& s, T scale) {
  const int size = tile_of(launch, s, s.inner / V);
  const int64_t tiles = ceil_div<int64_t>(s.index.n, size), jobs = tiles * s.outer;
  const Scratch parts(static_cast<size_t>(jobs * 2 * s.inner) * sizeof(T), launch);
  const auto layout = [&](int64_t columns) {
    const int across = static_cast<int>(
        std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(columns, kThreads))));
    const int64_t down = std::min<int64_t>(ceil_div<int64_t>(jobs, kThreads / across), 65535);
    return std::pair(across, dim3(ceil_div<int64_t>(columns, across), static_cast<unsigned>(down)));
  };
  const auto [across, grid] = layout(s.inner / V);
  launch(sum_tiles<S, T, V>, grid, dim3(kThreads), 0, s, scale, parts.data<T>(), across,
         size);
  if (tiles == 1) return;
  const auto [join_across, join_grid] = layout(s.inner);
  launch(join_tiles<T>, join_grid, dim3(kThreads), 0, s, scale,
         static_cast<const T*>(parts.data<T>()), join_across, size);
}

template <class S>
bool vectors(const RowSums& s) {
  constexpr int64_t V = 16 / sizeof(S);
  const auto both =
      reinterpret_cast<uintptr_t>(s.source) | reinterpret_cast<uintptr_t>(s.target);
  return s.inner % V == 0 && both % 16 == 0;
}

}  // namespace

void add_rows(const Launch& launch, const RowSums& s, const Scalar& scale) {
  if (s.outer * s.inner * s.index.n == 0) return;
  visit_compute(s.dtype, [&]<class T>() {
    const T factor = scale.to<T>();
    if constexpr (std::is_same_v<T, float>) {
      if (s.dtype == DType::Float32 && vectors<float>(s))
        return run<float, float, 4>(launch, s, factor);
      if (s.dtype == DType::BFloat16 && vectors<__nv_bfloat16>(s))
        return run<__nv_bfloat16, float, 8>(launch, s, factor);
      if (s.dtype == DType::Float16 && vectors<__half>(s))
        return run<__half, float, 8>(launch, s, factor);
    }
    run<void, T, 1>(launch, s, factor);
  });
}

}  // namespace vt::cuda
