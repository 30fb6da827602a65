// Reductions over any set of dimensions of any strided input, without a copy of it.
//
// What is kept and what is reduced are two index spaces over the input's memory. The row kernel
// gives each kept element a group of threads that walk its reduced elements; the column kernel
// lays threads across kept elements (neighbours in memory) and lets them walk down. Where there
// are few results and much input, the reduced space is split, parts go to scratch memory and a
// second launch merges them. Every merge has a fixed order: equal inputs give equal results.
//
// An Op has: type `Acc`; `Acc start()`, the identity; `void step(Acc&, T value, int64_t index)`,
// with the position in the reduced space; `void merge(Acc&, const Acc&)`, associative; and
// `void store(const ReduceOutput&, int64_t position, const Acc&)`.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "core/tensor.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/offsets.cuh"

namespace vt::cuda {

inline constexpr int kReduceDims = 12;
inline constexpr int kReduceThreads = 256;
inline constexpr int kReduceUnroll = 4;

/// An index space and N strided views of it. Dimension 0 moves fastest.
template <int N>
struct IndexSpace {
  int ndim = 0;
  bool wide = false;  // 2^31 elements or more: divisions take 64 bits
  int64_t numel = 1;
  int64_t extent[kReduceDims];
  FastDivisor divisor[kReduceDims];
  int64_t stride[N][kReduceDims];

  /// Adds the outermost dimension so far; false if there are too many.
  bool push(int64_t size, const int64_t (&strides)[N]) {
    if (size == 1) return true;
    if (ndim > 0) {
      bool merges = true;
      for (int i = 0; i < N; ++i)
        merges = merges && strides[i] == extent[ndim - 1] * stride[i][ndim - 1];
      if (merges) {
        extent[ndim - 1] *= size;
        numel *= size;
        return true;
      }
    }
    if (ndim == kReduceDims) return false;
    extent[ndim] = size;
    for (int i = 0; i < N; ++i) stride[i][ndim] = strides[i];
    ++ndim;
    numel *= size;
    return true;
  }
  void finish() {
    wide = numel >= int64_t{1} << 31;
    if (numel == 0) ndim = 0;
    for (int d = 0; d < ndim && !wide; ++d)
      divisor[d] = FastDivisor(static_cast<uint32_t>(extent[d]));
  }

  __device__ __forceinline__ void get(int64_t index, int64_t (&offset)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) offset[i] = 0;
    if (ndim == 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) offset[i] = index * stride[i][0];
      return;
    }
    if (wide) {
      for (int d = 0; d < ndim; ++d) {
        const int64_t rest = index / extent[d], here = index - rest * extent[d];
        index = rest;
#pragma unroll
        for (int i = 0; i < N; ++i) offset[i] += here * stride[i][d];
      }
      return;
    }
    auto left = static_cast<uint32_t>(index);
    for (int d = 0; d < ndim; ++d) {
      const uint32_t rest = divisor[d].divide(left), here = left - rest * divisor[d].divisor;
      left = rest;
#pragma unroll
      for (int i = 0; i < N; ++i) offset[i] += here * stride[i][d];
    }
  }
};

/// Strides of the input are in bytes, those of the output in elements.
struct ReduceGeometry {
  const char* data;
  IndexSpace<2> kept;
  IndexSpace<1> reduced;
};

/// Where results go. What the other members mean is the Op's business.
struct ReduceOutput {
  char* data;
  DType dtype;
  int size;  // of an element
  double scale;
  int64_t* indices;
};

/// How the work is laid out; `splits` parts of `part` reduced elements each.
struct ReduceLayout {
  int64_t part, splits;
  int group;   // row kernel: threads a row; column kernel: threads across
  bool dense;  // row kernel: the reduced elements of a row are adjacent
};

/// Reads elements stored as S; vectors of them in 16 bytes.
template <class S>
struct Stored {
  using Value = Compute<S>;
  using Element = S;
  __device__ Value operator()(const char* p) const {
    return convert<Value>(*reinterpret_cast<const S*>(p));
  }
};
/// Bytes that are flags.
struct StoredFlag {
  using Value = bool;
  using Element = uint8_t;
  __device__ bool operator()(const char* p) const {
    return *reinterpret_cast<const uint8_t*>(p) != 0;
  }
};
/// Reads elements of any dtype as T.
template <class T>
struct Converted {
  using Value = T;
  using Element = void;
  DType dtype;
  __device__ T operator()(const char* p) const { return load_as<T>(p, dtype); }
};
template <class Load>
inline constexpr bool kIsStored = !std::is_void_v<typename Load::Element>;

namespace detail {

/// Elements of a 16-byte vector; 1 where the dtype is only known at run time.
template <class Load>
constexpr int reduce_width() {
  if constexpr (kIsStored<Load>)
    return 16 / static_cast<int>(sizeof(typename Load::Element));
  else
    return 1;
}
/// Columns a thread takes; large accumulators (of values with places) would fill the registers.
template <class Load, class Op>
constexpr int column_width() {
  return sizeof(typename Op::Acc) > 8 ? 1 : std::min(reduce_width<Load>(), 8);
}

template <class Acc>
__device__ inline Acc shuffle_down(const Acc& value, int distance) {
  constexpr int kWords = (sizeof(Acc) + 3) / 4;
  uint32_t words[kWords] = {};
  std::memcpy(words, &value, sizeof(Acc));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], distance);
  Acc out;
  std::memcpy(&out, words, sizeof(Acc));
  return out;
}

/// Merges the accumulators of `group` neighbouring threads (a power of two) into the first.
template <class Op, class Acc>
__device__ inline void merge_group(const Op& op, Acc& acc, int group) {
  for (int distance = (group < kWarp ? group : kWarp) / 2; distance > 0; distance /= 2)
    op.merge(acc, shuffle_down(acc, distance));
  if (group <= kWarp) return;
  __shared__ Acc warps[kReduceThreads / kWarp];
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) warps[warp] = acc;
  __syncthreads();
  if (threadIdx.x % group == 0) {
    for (int w = 1; w < group / kWarp; ++w) op.merge(acc, warps[warp + w]);
  }
}

/// The elements [0, n) of a dense run, `lane` of `group` threads: 16-byte loads between an
/// unaligned head and a tail.
template <class Load, class Op, class Acc>
__device__ inline void walk_dense(const Load& load, const Op& op, Acc (&acc)[kReduceUnroll],
                                  const char* data, int64_t first, int64_t n, int lane, int group) {
  constexpr int kWidth = reduce_width<Load>(), kSize = 16 / kWidth;
  using Packed = Vector<typename Load::Element, kWidth>;
  const int64_t skewed = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16);
  const int64_t head = skewed == 0 ? 0 : min(n, (16 - skewed) / kSize);
  for (int64_t i = lane; i < head; i += group) op.step(acc[0], load(data + i * kSize), first + i);
  const auto* vectors = reinterpret_cast<const Packed*>(data + head * kSize);
  const int64_t count = (n - head) / kWidth;
  int64_t v = lane;
  for (; v + (kReduceUnroll - 1) * group < count; v += kReduceUnroll * group) {
    Packed loaded[kReduceUnroll];
#pragma unroll
    for (int u = 0; u < kReduceUnroll; ++u) loaded[u] = vectors[v + u * group];
#pragma unroll
    for (int u = 0; u < kReduceUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        op.step(acc[u], load(reinterpret_cast<const char*>(&loaded[u].value[k])),
                first + head + (v + u * group) * kWidth + k);
    }
  }
  for (; v < count; v += group) {
    const Packed loaded = vectors[v];
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      op.step(acc[0], load(reinterpret_cast<const char*>(&loaded.value[k])),
              first + head + v * kWidth + k);
  }
  for (int64_t i = head + count * kWidth + lane; i < n; i += group)
    op.step(acc[1], load(data + i * kSize), first + i);
}

template <class Load, class Op>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_rows(Load load, Op op, const __grid_constant__ ReduceGeometry g, ReduceLayout layout,
                ReduceOutput out, typename Op::Acc* partial) {
  using Acc = typename Op::Acc;
  const int group = layout.group, lane = threadIdx.x % group;
  const int64_t row = int64_t{blockIdx.x} * (kReduceThreads / group) + threadIdx.x / group;
  const bool live = row < g.kept.numel;
  Acc acc[kReduceUnroll];
#pragma unroll
  for (Acc& a : acc) a = op.start();
  int64_t place[2] = {0, 0};
  if (live) {
    g.kept.get(row, place);
    const char* data = g.data + place[0];
    const int64_t first = blockIdx.y * layout.part,
                  last = min(first + layout.part, g.reduced.numel);
    bool done = false;
    if constexpr (kIsStored<Load>) {
      if (layout.dense) {
        walk_dense(load, op, acc, data + first * sizeof(typename Load::Element), first,
                   last - first, lane, group);
        done = true;
      }
    }
    if (!done) {
      int64_t i = first + lane;
      for (; i + (kReduceUnroll - 1) * group < last; i += kReduceUnroll * group) {
        typename Load::Value values[kReduceUnroll];
#pragma unroll
        for (int u = 0; u < kReduceUnroll; ++u) {
          int64_t offset[1];
          g.reduced.get(i + u * group, offset);
          values[u] = load(data + offset[0]);
        }
#pragma unroll
        for (int u = 0; u < kReduceUnroll; ++u) op.step(acc[u], values[u], i + u * group);
      }
      for (; i < last; i += group) {
        int64_t offset[1];
        g.reduced.get(i, offset);
        op.step(acc[0], load(data + offset[0]), i);
      }
    }
  }
#pragma unroll
  for (int u = kReduceUnroll / 2; u > 0; u /= 2) {
#pragma unroll
    for (int k = 0; k < u; ++k) op.merge(acc[k], acc[k + u]);
  }
  merge_group(op, acc[0], group);
  if (!live || lane != 0) return;
  if (partial)
    partial[row * layout.splits + blockIdx.y] = acc[0];
  else
    op.store(out, place[1], acc[0]);
}

/// V kept elements a thread, adjacent in memory; `layout.group` threads across, the rest down.
template <class Load, class Op, int V>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_columns(Load load, Op op, const __grid_constant__ ReduceGeometry g, ReduceLayout layout,
                   ReduceOutput out, typename Op::Acc* partial) {
  using Acc = typename Op::Acc;
  const int across = layout.group, x = threadIdx.x % across, y = threadIdx.x / across,
            down = kReduceThreads / across;
  const int64_t column = (int64_t{blockIdx.x} * across + x) * V;
  const bool live = column < g.kept.numel;
  Acc acc[V];
#pragma unroll
  for (Acc& a : acc) a = op.start();
  int64_t place[2] = {0, 0};
  if (live) {
    g.kept.get(column, place);
    const char* data = g.data + place[0];
    const int64_t first = blockIdx.y * layout.part,
                  last = min(first + layout.part, g.reduced.numel);
    const auto take = [&](int64_t i, typename Load::Value(&values)[V]) {
      int64_t offset[1];
      g.reduced.get(i, offset);
      if constexpr (V > 1) {
        const auto loaded =
            *reinterpret_cast<const Vector<typename Load::Element, V>*>(data + offset[0]);
#pragma unroll
        for (int k = 0; k < V; ++k)
          values[k] = load(reinterpret_cast<const char*>(&loaded.value[k]));
      } else {
        values[0] = load(data + offset[0]);
      }
    };
    int64_t i = first + y;
    for (; i + (kReduceUnroll - 1) * down < last; i += kReduceUnroll * down) {
      typename Load::Value values[kReduceUnroll][V];
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u) take(i + u * down, values[u]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        // Four rows make a sum of their own first: shorter chains, smaller rounding errors.
        Acc some = op.start();
#pragma unroll
        for (int u = 0; u < kReduceUnroll; ++u) op.step(some, values[u][k], i + u * down);
        op.merge(acc[k], some);
      }
    }
    for (; i < last; i += down) {
      typename Load::Value values[V];
      take(i, values);
#pragma unroll
      for (int k = 0; k < V; ++k) op.step(acc[k], values[k], i);
    }
  }
  __shared__ Acc shared[V][kReduceThreads];
#pragma unroll
  for (int k = 0; k < V; ++k) shared[k][threadIdx.x] = acc[k];
  for (int half = down / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        op.merge(acc[k], shared[k][threadIdx.x + half * across]);
        shared[k][threadIdx.x] = acc[k];
      }
    }
  }
  if (!live || y != 0) return;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (partial)
      partial[blockIdx.y * g.kept.numel + column + k] = acc[k];
    else
      op.store(out, place[1] + k * (g.kept.ndim > 0 ? g.kept.stride[1][0] : 0), acc[k]);
  }
}

/// Merges `splits` parts of every result.
template <class Op>
__global__ void __launch_bounds__(kReduceThreads)
    merge_parts(Op op, const __grid_constant__ IndexSpace<2> kept, const typename Op::Acc* partial,
                int64_t result_stride, int64_t part_stride, int64_t splits, int group,
                ReduceOutput out) {
  using Acc = typename Op::Acc;
  const int lane = threadIdx.x % group;
  const int64_t row = int64_t{blockIdx.x} * (kReduceThreads / group) + threadIdx.x / group;
  const bool live = row < kept.numel;
  Acc acc = op.start();
  if (live) {
#pragma unroll 4
    for (int64_t s = lane; s < splits; s += group)
      op.merge(acc, partial[row * result_stride + s * part_stride]);
  }
  merge_group(op, acc, group);
  if (!live || lane != 0) return;
  int64_t place[2];
  kept.get(row, place);
  op.store(out, place[1], acc);
}

inline int64_t power_of_two(int64_t n, int64_t most) {
  return std::min<int64_t>(most, std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(n, 1))));
}

/// The geometry of reducing the dimensions in `mask`; false if it has too many dimensions.
/// `any_order`: results do not depend on the order of the reduced elements.
inline bool plan(ReduceGeometry& g, const Tensor& self, uint64_t mask, bool any_order) {
  struct Dim {
    int64_t size, in, out;
  };
  std::vector<Dim> kept, reduced;  // outermost first
  int64_t out_stride = 1;
  for (int64_t d = self.dim() - 1; d >= 0; --d) {
    const int64_t size = self.sizes()[d], in = self.strides()[d] * self.itemsize();
    if (mask >> d & 1) {
      reduced.insert(reduced.begin(), {size, in, 0});
    } else {
      kept.insert(kept.begin(), {size, in, out_stride});
      out_stride *= size;
    }
  }
  // In the order of memory, whatever the order of the dimensions.
  const auto outer_first = [](const Dim& a, const Dim& b) { return a.in > b.in; };
  std::stable_sort(kept.begin(), kept.end(), outer_first);
  if (any_order) std::stable_sort(reduced.begin(), reduced.end(), outer_first);
  g.data = static_cast<const char*>(self.data());
  bool fits = true;
  for (auto d = kept.rbegin(); d != kept.rend(); ++d)
    fits = fits && g.kept.push(d->size, {d->in, d->out});
  for (auto d = reduced.rbegin(); d != reduced.rend(); ++d)
    fits = fits && g.reduced.push(d->size, {d->in});
  g.kept.finish();
  g.reduced.finish();
  return fits;
}

/// Kept dimensions first, the reduced ones last, dense: two dimensions at most.
inline Tensor arranged(const Tensor& self, uint64_t& mask) {
  Dims sizes, strides;
  uint64_t moved = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t d = 0; d < self.dim(); ++d) {
      if ((mask >> d & 1) != static_cast<uint64_t>(pass)) continue;
      if (pass == 1) moved |= uint64_t{1} << sizes.size();
      sizes.push_back(self.sizes()[d]);
      strides.push_back(self.strides()[d]);
    }
  }
  mask = moved;
  return contiguous(make_view(self, sizes, strides, self.storage_offset()));
}

}  // namespace detail

/// Reduces the dimensions of `self` in `mask` into `out`, which is dense in row-major order of the
/// kept ones.
template <class Load, class Op>
void reduce(const Tensor& self, uint64_t mask, const Load& load, const Op& op,
            const ReduceOutput& out, bool any_order = true) {
  using Acc = typename Op::Acc;
  using namespace detail;
  ReduceGeometry g;
  Tensor input = self;
  if (!plan(g, input, mask, any_order)) {
    input = arranged(self, mask);
    g = {};
    plan(g, input, mask, any_order);
  }
  const int64_t results = g.kept.numel, n = g.reduced.numel;
  if (results == 0) return;
  const Launch launch(self.device());
  constexpr int64_t kSize = kIsStored<Load> ? 16 / reduce_width<Load>() : 0;
  // Threads across kept elements where those are the nearer neighbours.
  const bool columns =
      g.kept.ndim > 0 && g.reduced.ndim > 0 && g.kept.stride[0][0] < g.reduced.stride[0][0];
  ReduceLayout layout{n, 1, 1, false};
  const int64_t wanted = int64_t{launch.properties().multiprocessors} * 32;  // blocks
  int64_t blocks;
  bool vectors = false;
  if (columns) {
    constexpr int V = column_width<Load, Op>();
    if constexpr (V > 1) {
      const int64_t unit = kSize * V;
      vectors = g.kept.stride[0][0] == kSize && g.kept.extent[0] % V == 0 &&
                reinterpret_cast<uintptr_t>(g.data) % unit == 0;
      for (int d = 1; d < g.kept.ndim; ++d) vectors = vectors && g.kept.stride[0][d] % unit == 0;
      for (int d = 0; d < g.reduced.ndim; ++d)
        vectors = vectors && g.reduced.stride[0][d] % unit == 0;
    }
    const int64_t lanes = results / (vectors ? V : 1);
    const int64_t down = power_of_two(n / 8, 8);
    layout.group = static_cast<int>(power_of_two(lanes, kReduceThreads / down));
    blocks = ceil_div<int64_t>(lanes, layout.group);
    // A part is worth at least 16 rows a thread.
    const int64_t least = int64_t{kReduceThreads / layout.group} * 16;
    layout.splits = std::clamp<int64_t>(wanted / blocks, 1, std::max<int64_t>(n / least, 1));
  } else {
    layout.dense =
        kIsStored<Load> && (n <= 1 || (g.reduced.ndim == 1 && g.reduced.stride[0][0] == kSize));
    const int64_t units = layout.dense ? n / reduce_width<Load>() : n;
    layout.group = static_cast<int>(power_of_two(ceil_div<int64_t>(units, 4), kReduceThreads));
    // Where the rows fill the device twice anyway, fewer threads take more of a row each, down to a
    // warp: a block's beginning and end, which read nothing, are then a smaller part of it.
    const int64_t full = int64_t{2} * launch.properties().multiprocessors *
                         launch.properties().max_threads_per_sm;
    while (layout.dense && layout.group > kWarp && results * (layout.group / 2) >= full)
      layout.group /= 2;
    blocks = ceil_div<int64_t>(results, kReduceThreads / layout.group);
    const int64_t least = int64_t{kReduceThreads} * 8 * (layout.dense ? reduce_width<Load>() : 1);
    layout.splits = std::clamp<int64_t>(wanted / blocks, 1, std::max<int64_t>(n / least, 1));
  }
  layout.splits = std::min<int64_t>(layout.splits, 65535);
  layout.part = ceil_div<int64_t>(n, layout.splits);
  // Parts start on 128-byte lines where rows do.
  if (layout.splits > 1) layout.part = ceil_div<int64_t>(layout.part, 128) * 128;
  if (n > 0) layout.splits = ceil_div<int64_t>(n, layout.part);
  const bool split = layout.splits > 1;
  const Scratch scratch(split ? static_cast<size_t>(results * layout.splits) * sizeof(Acc) : 0,
                        launch);
  Acc* partial = split ? scratch.data<Acc>() : nullptr;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layout.splits));
  if (!columns) {
    launch(reduce_rows<Load, Op>, grid, dim3(kReduceThreads), 0, load, op, g, layout, out, partial);
  } else {
    bool done = false;
    if constexpr (column_width<Load, Op>() > 1) {
      if (vectors) {
        launch(reduce_columns<Load, Op, column_width<Load, Op>()>, grid, dim3(kReduceThreads), 0,
               load, op, g, layout, out, partial);
        done = true;
      }
    }
    if (!done)
      launch(reduce_columns<Load, Op, 1>, grid, dim3(kReduceThreads), 0, load, op, g, layout, out,
             partial);
  }
  if (!split) return;
  const int group = columns && results >= 4096
                        ? 1
                        : static_cast<int>(power_of_two(layout.splits / 2, kReduceThreads));
  launch(merge_parts<Op>, dim3(ceil_div<int64_t>(results, kReduceThreads / group)),
         dim3(kReduceThreads), 0, op, g.kept, partial, columns ? int64_t{1} : layout.splits,
         columns ? results : int64_t{1}, layout.splits, group, out);
}

/// Dimensions to reduce as a bit mask; none given means all.
inline uint64_t dim_mask(std::optional<IntSpan> dims, int64_t ndim) {
  const uint64_t all = ndim >= 64 ? ~uint64_t{0} : (uint64_t{1} << ndim) - 1;
  if (!dims || dims->empty()) return all;
  uint64_t mask = 0;
  for (const int64_t d : *dims) mask |= uint64_t{1} << wrap_dim(d, ndim);
  return mask & all;
}
/// The same for any and all, which an empty list leaves nothing to reduce.
inline uint64_t tested_mask(std::optional<IntSpan> dims, int64_t ndim) {
  return dims && dims->empty() ? 0 : dim_mask(dims, ndim);
}
inline uint64_t dim_mask(int64_t dim, int64_t ndim) {
  return ndim == 0 ? 0 : uint64_t{1} << wrap_dim(dim, ndim);
}

}  // namespace vt::cuda
