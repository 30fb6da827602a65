// Copies rows of bytes by index: out[o, i, :] = in[o, index[i], :]. Sixteen bytes an access where
// the addresses allow.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/kernels/indices.cuh"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// Byte geometry: `row_bytes` are moved; rows of the source lie `row_step` apart.
struct RowCopies {
  const char* from;
  char* to;
  int64_t outer, count;  // rows of the output
  int64_t row_bytes, row_step, outer_step;
};

constexpr int64_t kManyRows = 4096;

template <class Unit>
__global__ void __launch_bounds__(256)
    copy_rows_kernel(const __grid_constant__ RowCopies c, Indices indices, int across) {
  const int x = threadIdx.x % across;
  const int64_t row = int64_t{blockIdx.x} * (256 / across) + threadIdx.x / across;
  if (row >= c.outer * c.count) return;
  const int64_t o = c.outer == 1 ? 0 : row / c.count, i = row - o * c.count;
  const auto* from =
      reinterpret_cast<const Unit*>(c.from + o * c.outer_step + indices(i) * c.row_step);
  auto* to = reinterpret_cast<Unit*>(c.to + row * c.row_bytes);
  const int64_t units = c.row_bytes / static_cast<int64_t>(sizeof(Unit));
  constexpr int kBatch = 4;  // loads under way
  for (int64_t first = x; first < units; first += int64_t{kBatch} * across) {
    Unit held[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * across < units) held[b] = from[first + b * across];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * across < units) to[first + b * across] = held[b];
    }
  }
}

/// Copies `outer * count` rows; nothing to do if there are none or they are empty.
inline void copy_rows(const Launch& launch, const RowCopies& c, const Indices& indices) {
  if (c.outer * c.count == 0 || c.row_bytes == 0) return;
  const uint64_t all = reinterpret_cast<uintptr_t>(c.from) | reinterpret_cast<uintptr_t>(c.to) |
                       static_cast<uint64_t>(c.row_bytes) | static_cast<uint64_t>(c.row_step) |
                       static_cast<uint64_t>(c.outer_step);
  const auto run = [&]<class Unit>() {
    const auto units = static_cast<uint64_t>(c.row_bytes) / sizeof(Unit);
    // Where there are many rows a warp takes one, so that each thread has several loads under way.
    const uint64_t most = units <= 1024 && c.outer * c.count >= kManyRows ? kWarp : 256;
    const int across = static_cast<int>(std::bit_ceil(std::min(units, most)));
    launch(copy_rows_kernel<Unit>, dim3(ceil_div<int64_t>(c.outer * c.count, 256 / across)),
           dim3(256), 0, c, indices, across);
  };
  if (all % 16 == 0)
    run.template operator()<uint4>();
  else if (all % 8 == 0)
    run.template operator()<uint64_t>();
  else if (all % 4 == 0)
    run.template operator()<uint32_t>();
  else if (all % 2 == 0)
    run.template operator()<uint16_t>();
  else
    run.template operator()<uint8_t>();
}

}  // namespace vt::cuda
