// Moving elements between two layouts: strided copies by the widest access that fits, and transposes
// through tiles in shared memory, of one dtype or between float and the 16-bit floats.
#include <algorithm>

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/transpose.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int64_t kMaxMoves = int64_t{1} << 30;  // of one launch

/// Operand 0 is written, operand 1 read; strides in bytes, dimension 0 moves fastest.
struct Box {
  char* data[2];
  int64_t shape[kMaxDims];
  int64_t stride[2][kMaxDims];
  int ndim = 0;

  int64_t numel(int from = 0) const {
    int64_t n = 1;
    for (int d = from; d < ndim; ++d) n *= shape[d];
    return n;
  }
};

Box box_of(const TensorIterator& it) {
  Box box;
  box.ndim = it.ndim();
  std::copy_n(it.shape(), box.ndim, box.shape);
  for (int i = 0; i < 2; ++i) {
    box.data[i] = it.data(i);
    for (int d = 0; d < box.ndim; ++d) box.stride[i][d] = it.stride(i, d);
  }
  return box;
}

/// Calls f on parts of the box that have at most `limit` elements in dimensions `from`… and few
/// enough of these for Offsets.
template <class F>
void for_parts(Box box, int from, int64_t limit, const F& f) {
  while (box.ndim > from + 1 && box.shape[box.ndim - 1] == 1) --box.ndim;
  if (box.numel(from) <= limit && box.ndim - from <= kMaxOffsetDims) return f(box);
  const int d = box.ndim - 1;
  const int64_t extent = box.shape[d];
  const int64_t part = box.ndim - from > kMaxOffsetDims ? 1 : ceil_div<int64_t>(extent, 2);
  Box rest = box;
  for (int64_t at = 0; at < extent; at += part) {
    rest.shape[d] = std::min(part, extent - at);
    for (int i = 0; i < 2; ++i) rest.data[i] = box.data[i] + at * box.stride[i][d];
    for_parts(rest, from, limit, f);
  }
}

Offsets<2> offsets_of(const Box& box, int from) {
  Offsets<2> offsets;
  offsets.ndim = box.ndim - from;
  for (int d = from; d < box.ndim; ++d) {
    offsets.extent[d - from] = FastDivisor(static_cast<uint32_t>(box.shape[d]));
    for (int i = 0; i < 2; ++i) offsets.stride[i][d - from] = box.stride[i][d];
  }
  return offsets;
}

template <class W>
__global__ void __launch_bounds__(kThreads)
    move_kernel(char* out, const char* in, const __grid_constant__ Offsets<2> offsets, uint32_t n) {
  const uint32_t base = blockIdx.x * (kThreads * kPerThread) + threadIdx.x;
  W value[kPerThread];
  char* target[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const uint32_t i = base + k * kThreads;
    if (i >= n) break;
    int64_t offset[2];
    offsets.get(i, offset);
    value[k] = *reinterpret_cast<const W*>(in + offset[1]);
    target[k] = out + offset[0];
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (base + k * kThreads >= n) break;
    *reinterpret_cast<W*>(target[k]) = value[k];
  }
}

template <class W>
void move_by(const Launch& launch, const Box& whole) {
  for_parts(whole, 0, kMaxMoves, [&](const Box& box) {
    const auto n = static_cast<uint32_t>(box.numel());
    launch(move_kernel<W>, dim3(ceil_div(n, uint32_t{kThreads * kPerThread})), dim3(kThreads), 0,
           box.data[0], box.data[1], offsets_of(box, 0), n);
  });
}

/// Elements dense in both along dimension 0 move as wider ones, as far as every place allows.
int64_t widen(Box& box, int64_t size) {
  if (box.stride[0][0] != size || box.stride[1][0] != size) return size;
  int64_t width = 16;
  const auto fits = [&](int64_t bytes) { return bytes % width == 0; };
  for (; width > size; width /= 2) {
    bool ok = fits(box.shape[0] * size);
    for (int i = 0; i < 2; ++i) {
      ok = ok && fits(reinterpret_cast<intptr_t>(box.data[i]));
      for (int d = 1; d < box.ndim; ++d) ok = ok && fits(box.stride[i][d]);
    }
    if (ok) break;
  }
  box.shape[0] = box.shape[0] * size / width;
  box.stride[0][0] = box.stride[1][0] = width;
  return width;
}

// A tile is read along the input's dense dimension and written along the output's. Its rows are
// padded so that the columns of a warp lie in different banks.
template <class W>
constexpr int kTile = sizeof(W) <= 2 ? 64 : 32;
template <class W>
constexpr int kTilePad = sizeof(W) >= 4 ? 1 : 4 / sizeof(W);
constexpr int kTileRows = kThreads / kWarp;  // rows of a tile a block moves at a time

/// Dimension 0 is dense in the output, dimension 1 in the input; the others are the batch.
struct Transpose {
  int64_t columns, rows;  // extents of dimensions 0 and 1
  int64_t in_column, out_row;
  uint32_t column_tiles, row_tiles;
  Offsets<2> batch;
};

/// W: as read. To: as written.
template <class W, class To>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(char* out, const char* in, const __grid_constant__ Transpose t) {
  constexpr int tile = kTile<W>;
  __shared__ W values[tile][tile + kTilePad<W>];
  const uint32_t outer = blockIdx.x / t.column_tiles;
  const int64_t column = int64_t{blockIdx.x - outer * t.column_tiles} * tile;
  const uint32_t batch = outer / t.row_tiles;
  const int64_t row = int64_t{outer - batch * t.row_tiles} * tile;
  int64_t offset[2];
  t.batch.get(batch, offset);
  const int x = threadIdx.x % kWarp, y = threadIdx.x / kWarp;
#pragma unroll
  for (int c = y; c < tile; c += kTileRows) {
#pragma unroll
    for (int r = x; r < tile; r += kWarp) {
      if (column + c < t.columns && row + r < t.rows)
        values[c][r] = *reinterpret_cast<const W*>(in + offset[1] + (column + c) * t.in_column +
                                                   (row + r) * sizeof(W));
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = y; r < tile; r += kTileRows) {
#pragma unroll
    for (int c = x; c < tile; c += kWarp) {
      if (column + c >= t.columns || row + r >= t.rows) continue;
      auto* const to = reinterpret_cast<To*>(out + offset[0] + (row + r) * t.out_row) + column + c;
      if constexpr (std::is_same_v<W, To>)
        *to = values[c][r];
      else
        *to = convert<To>(convert<float>(values[c][r]));
    }
  }
}

template <class W, class To = W>
void transpose(const Launch& launch, const Box& whole) {
  Transpose t;
  t.columns = whole.shape[0];
  t.rows = whole.shape[1];
  t.in_column = whole.stride[1][0];
  t.out_row = whole.stride[0][1];
  const int64_t column_tiles = ceil_div<int64_t>(t.columns, kTile<W>),
                row_tiles = ceil_div<int64_t>(t.rows, kTile<W>);
  t.column_tiles = static_cast<uint32_t>(column_tiles);
  t.row_tiles = static_cast<uint32_t>(row_tiles);
  const int64_t limit = std::max<int64_t>(1, kMaxMoves / (column_tiles * row_tiles));
  for_parts(whole, 2, limit, [&](const Box& box) {
    t.batch = offsets_of(box, 2);
    launch(transpose_kernel<W, To>,
           dim3(static_cast<uint32_t>(box.numel(2) * column_tiles * row_tiles)), dim3(kThreads), 0,
           box.data[0], box.data[1], t);
  });
}

/// Brings the dimension that is dense in the input, of elements of `size` bytes, to place 1; those of
/// the output have `to_size`. False if there is none, or the tiles would be mostly empty.
bool order_for_transpose(Box& box, int64_t size, int64_t to_size) {
  constexpr int64_t kLeast = 16;
  if (box.ndim < 2 || box.stride[0][0] != to_size || box.stride[1][0] == size) return false;
  for (int d = 1; d < box.ndim; ++d) {
    if (box.stride[1][d] != size || box.shape[d] < kLeast) continue;
    std::swap(box.shape[1], box.shape[d]);
    for (int i = 0; i < 2; ++i) std::swap(box.stride[i][1], box.stride[i][d]);
    const int64_t tiles = ceil_div<int64_t>(box.shape[0], 32) * ceil_div<int64_t>(box.shape[1], 32);
    return box.shape[0] >= kLeast && tiles <= kMaxMoves;
  }
  return false;
}

}  // namespace

void move_elements(const Launch& launch, const TensorIterator& it) {
  if (it.numel() == 0) return;
  const int64_t size = item_size(it.dtype(0));
  Box box = box_of(it);
  if (order_for_transpose(box, size, size)) {
    visit_width(size, [&]<class W>() { transpose<W>(launch, box); });
    return;
  }
  const int64_t width = widen(box, size);
  if (width == 16)
    move_by<uint4>(launch, box);
  else
    visit_width(width, [&]<class W>() { move_by<W>(launch, box); });
}

bool convert_transposed(const Launch& launch, const TensorIterator& it) {
  const DType to = it.dtype(0), from = it.dtype(1);
  const auto narrow = [](DType d) { return d == DType::BFloat16 || d == DType::Float16; };
  const bool wider = to == DType::Float32 && narrow(from),
             narrower = from == DType::Float32 && narrow(to);
  if (it.numel() == 0 || (!wider && !narrower)) return false;
  Box box = box_of(it);
  if (!order_for_transpose(box, item_size(from), item_size(to))) return false;
  if (from == DType::BFloat16) transpose<__nv_bfloat16, float>(launch, box);
  if (from == DType::Float16) transpose<__half, float>(launch, box);
  if (to == DType::BFloat16) transpose<float, __nv_bfloat16>(launch, box);
  if (to == DType::Float16) transpose<float, __half>(launch, box);
  return true;
}

}  // namespace vt::cuda
