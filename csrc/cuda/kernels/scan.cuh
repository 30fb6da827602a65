// Inclusive scans along one dimension of a dense [outer, length, inner] input.
//
// Rows (inner = 1) are scanned by a block, tile by tile; columns by a thread each, neighbours
// side by side. Where that leaves the device idle the length is cut into parts: a first launch
// finds each part's total, a second what comes before each part, a third scans. The cuts depend
// on the shape and the device only, so equal inputs give equal results.
//
// An Op has: type `Acc`; `Acc start()`, the identity; `Acc load(int64_t position, int64_t index)`;
// `Acc combine(earlier, later)`, associative; `void store(int64_t position, const Acc&)`.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/tensor.h"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

struct ScanShape {
  int64_t outer = 1, length = 1, inner = 1;
  int64_t part = 1, parts = 1;
  __host__ __device__ int64_t lanes() const { return outer * inner; }
};

inline ScanShape scan_shape(const Tensor& t, int64_t dim) {
  ScanShape s;
  if (t.dim() == 0) return s;
  const int64_t d = wrap_dim(dim, t.dim());
  for (int64_t i = 0; i < t.dim(); ++i)
    (i < d ? s.outer : i == d ? s.length : s.inner) *= t.sizes()[i];
  return s;
}

namespace detail {

inline constexpr int kScanThreads = 256, kScanItems = 8, kScanTile = kScanThreads * kScanItems;

template <class Acc>
__device__ inline Acc shuffle_up(const Acc& value, int distance) {
  constexpr int kWords = (sizeof(Acc) + 3) / 4;
  uint32_t words[kWords] = {};
  memcpy(words, &value, sizeof(Acc));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_up_sync(0xffffffffu, words[i], distance);
  Acc out;
  memcpy(&out, words, sizeof(Acc));
  return out;
}

/// Combines the accumulators of all threads before this one, in order.
template <class Op, class Acc>
__device__ inline Acc exclusive_of_block(const Op& op, const Acc& mine) {
  __shared__ Acc warps[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Acc sum = mine;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Acc before = shuffle_up(sum, distance);
    if (lane >= distance) sum = op.combine(before, sum);
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  const Acc shifted = shuffle_up(sum, 1);
  __syncthreads();
  Acc prefix = op.start();
  for (int w = 0; w < warp; ++w) prefix = op.combine(prefix, warps[w]);
  return lane == 0 ? prefix : op.combine(prefix, shifted);
}

/// One part of one row. With `totals`, only what the part combines to is written, there.
template <class Op>
__global__ void __launch_bounds__(kScanThreads)
    scan_rows(Op op, ScanShape shape, const typename Op::Acc* carries, typename Op::Acc* totals) {
  using Acc = typename Op::Acc;
  // A thread's items lie side by side; the gap of one after them avoids bank conflicts.
  __shared__ Acc tile[kScanThreads * (kScanItems + 1)];
  __shared__ Acc next;
  const int64_t row = blockIdx.x / shape.parts, part = blockIdx.x % shape.parts;
  const int64_t start = row * shape.length, first = part * shape.part,
                last = min(first + shape.part, shape.length);
  Acc carry = carries && part > 0 ? carries[row * shape.parts + part - 1] : op.start();
  for (int64_t base = first; base < last; base += kScanTile) {
    Acc items[kScanItems];
#pragma unroll
    for (int u = 0; u < kScanItems; ++u) {
      const int64_t i = base + u * kScanThreads + threadIdx.x;
      items[u] = i < last ? op.load(start + i, i) : op.start();
    }
#pragma unroll
    for (int u = 0; u < kScanItems; ++u) {
      const int j = u * kScanThreads + threadIdx.x;
      tile[j + j / kScanItems] = items[u];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      items[k] = tile[threadIdx.x * (kScanItems + 1) + k];
      if (k > 0) items[k] = op.combine(items[k - 1], items[k]);
    }
    const Acc before = op.combine(carry, exclusive_of_block(op, items[kScanItems - 1]));
    if (!totals) {
#pragma unroll
      for (int k = 0; k < kScanItems; ++k)
        tile[threadIdx.x * (kScanItems + 1) + k] = op.combine(before, items[k]);
    }
    if (threadIdx.x == kScanThreads - 1) next = op.combine(before, items[kScanItems - 1]);
    __syncthreads();
    carry = next;
    if (!totals) {
#pragma unroll
      for (int u = 0; u < kScanItems; ++u) {
        const int j = u * kScanThreads + threadIdx.x;
        if (base + j < last) op.store(start + base + j, tile[j + j / kScanItems]);
      }
    }
    __syncthreads();
  }
  if (totals && threadIdx.x == 0) totals[row * shape.parts + part] = carry;
}

/// One part of one column a thread.
template <class Op>
__global__ void __launch_bounds__(kScanThreads)
    scan_columns(Op op, ScanShape shape, const typename Op::Acc* carries,
                 typename Op::Acc* totals) {
  using Acc = typename Op::Acc;
  constexpr int kAhead = 4;
  const int64_t id = int64_t{blockIdx.x} * kScanThreads + threadIdx.x, lanes = shape.lanes();
  if (id >= lanes * shape.parts) return;
  const int64_t part = id / lanes, lane = id % lanes;
  const int64_t start = lane / shape.inner * shape.length * shape.inner + lane % shape.inner;
  const int64_t first = part * shape.part, last = min(first + shape.part, shape.length);
  Acc sum = carries && part > 0 ? carries[(part - 1) * lanes + lane] : op.start();
  for (int64_t i = first; i < last; i += kAhead) {
    Acc items[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      items[u] = i + u < last ? op.load(start + (i + u) * shape.inner, i + u) : op.start();
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      sum = op.combine(sum, items[u]);
      if (!totals && i + u < last) op.store(start + (i + u) * shape.inner, sum);
    }
  }
  if (totals) totals[part * lanes + lane] = sum;
}

/// Scans the parts' totals of each lane in place.
template <class Op>
__global__ void __launch_bounds__(kScanThreads)
    scan_totals(Op op, typename Op::Acc* totals, int64_t lanes, int64_t parts, int64_t lane_stride,
                int64_t part_stride) {
  using Acc = typename Op::Acc;
  constexpr int kAhead = 8;
  const int64_t lane = int64_t{blockIdx.x} * kScanThreads + threadIdx.x;
  if (lane >= lanes) return;
  Acc* at = totals + lane * lane_stride;
  Acc sum = op.start();
  for (int64_t p = 0; p < parts; p += kAhead) {
    Acc items[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      items[u] = p + u < parts ? at[(p + u) * part_stride] : op.start();
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      sum = op.combine(sum, items[u]);
      if (p + u < parts) at[(p + u) * part_stride] = sum;
    }
  }
}

}  // namespace detail

template <class Op>
void scan(const Launch& launch, const Op& op, ScanShape shape) {
  using Acc = typename Op::Acc;
  using namespace detail;
  constexpr int64_t kMostParts = 1024;
  if (shape.lanes() * shape.length == 0) return;
  const bool rows = shape.inner == 1 && shape.length > 32;
  const int64_t processors = launch.properties().multiprocessors;
  if (rows) {
    shape.parts = std::clamp<int64_t>(processors * 8 / shape.outer, 1,
                                      std::max<int64_t>(shape.length / (2 * kScanTile), 1));
  } else {
    shape.parts = std::clamp<int64_t>(processors * 2048 / shape.lanes(), 1,
                                      std::max<int64_t>(shape.length / 64, 1));
  }
  shape.parts = std::min(shape.parts, kMostParts);
  shape.part = ceil_div(shape.length, shape.parts);
  if (rows && shape.parts > 1) shape.part = ceil_div<int64_t>(shape.part, kScanTile) * kScanTile;
  shape.parts = ceil_div(shape.length, shape.part);
  const int64_t blocks = rows ? shape.outer * shape.parts
                              : ceil_div<int64_t>(shape.lanes() * shape.parts, kScanThreads);
  const auto kernel = rows ? scan_rows<Op> : scan_columns<Op>;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kScanThreads);
  const Acc* no_carries = nullptr;
  Acc* no_totals = nullptr;
  if (shape.parts == 1) {
    launch(kernel, grid, block, 0, op, shape, no_carries, no_totals);
    return;
  }
  const Scratch scratch(static_cast<size_t>(shape.lanes() * shape.parts) * sizeof(Acc), launch);
  Acc* totals = scratch.data<Acc>();
  launch(kernel, grid, block, 0, op, shape, no_carries, totals);
  launch(scan_totals<Op>, dim3(ceil_div<int64_t>(shape.lanes(), kScanThreads)), block, 0, op, totals,
         shape.lanes(), shape.parts, rows ? shape.parts : int64_t{1},
         rows ? int64_t{1} : shape.lanes());
  launch(kernel, grid, block, 0, op, shape, static_cast<const Acc*>(totals), no_totals);
}

}  // namespace vt::cuda
