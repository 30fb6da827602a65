// A warp keeps 32 columns of the whole table in shared memory and adds its part of the rows to it,
// one after the other; then the warps of a block, and at last the blocks, are added in order.
#include "cuda/kernels/embedding_small.cuh"

#include <algorithm>
#include <limits>

#include "cuda/kernels/element.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kColumns = kWarp, kMostWarps = 16, kLeastWarps = 8;
constexpr int kAhead = 16;  // rows under way
// From this many rows for each of the table's on, and in all.
constexpr int64_t kRepeats = 32, kLeastRows = 4096;

template <class S>
__global__ void __launch_bounds__(kMostWarps* kWarp)
    sum_parts(float* parts, const S* grad, Indices indices, int64_t n, int length, int64_t inner) {
  extern __shared__ float sums[];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp, table = length * kColumns;
  float* const own = sums + warp * table + lane;
  for (int r = 0; r < length; ++r) own[r * kColumns] = 0.f;
  const int64_t column = int64_t{blockIdx.x} * kColumns + lane;
  const bool there = column < inner;
  const int64_t shares = int64_t{gridDim.y} * warps, share = int64_t{blockIdx.y} * warps + warp;
  const int64_t last = n * (share + 1) / shares;
  for (int64_t first = n * share / shares; first < last; first += kWarp) {
    const int key = first + lane < last ? static_cast<int>(indices(first + lane)) : 0;
#pragma unroll
    for (int from = 0; from < kWarp; from += kAhead) {
      float value[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t row = first + from + k;
        value[k] = there && row < last ? convert<float>(grad[row * inner + column]) : 0.f;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int to = __shfl_sync(0xffffffffu, key, from + k) * kColumns;
        if (first + from + k < last) own[to] += value[k];
      }
    }
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < table; e += static_cast<int>(blockDim.x)) {
    float sum = sums[e];
    for (int w = 1; w < warps; ++w) sum += sums[w * table + e];
    // e % kColumns is the thread's lane.
    if (there) parts[(int64_t{blockIdx.y} * length + e / kColumns) * inner + column] = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(256)
    join_parts(S* table, const float* parts, int count, int64_t elements, int64_t inner,
               int64_t padding) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= elements) return;
  float sum = parts[i];
#pragma unroll 8
  for (int p = 1; p < count; ++p) sum += parts[p * elements + i];
  table[i] = convert<S>(i / inner == padding ? 0.f : sum);
}

}  // namespace

bool sum_into_small_table(const Launch& launch, const Tensor& table, const Tensor& grad,
                          const Indices& indices, int64_t n, int64_t padding) {
  const int64_t length = table.sizes()[0], inner = table.sizes()[1];
  if (!is_floating(table.dtype()) || table.itemsize() > 4 || !table.is_contiguous()) return false;
  if (n < kLeastRows || n / length < kRepeats) return false;
  const int64_t own = length * kColumns * int64_t{sizeof(float)};
  const int64_t warps = std::min<int64_t>(kMostWarps, launch.properties().shared_memory_per_block / own);
  const int64_t groups = ceil_div<int64_t>(inner, kColumns);
  if (warps < kLeastWarps || groups > std::numeric_limits<int>::max()) return false;
  const int64_t down = std::clamp<int64_t>(launch.properties().multiprocessors / groups, 1,
                                           ceil_div<int64_t>(n, warps * kWarp));
  const Scratch parts(static_cast<size_t>(down * length * inner) * sizeof(float), launch);
  const auto go = [&]<class S>(S) {
    const auto bytes = static_cast<size_t>(warps * own);
    allow_shared_memory(sum_parts<S>, static_cast<int>(bytes));
    launch(sum_parts<S>, dim3(static_cast<unsigned>(groups), static_cast<unsigned>(down)),
           dim3(static_cast<unsigned>(warps * kWarp)), bytes, parts.data<float>(), grad.data_as<S>(),
           indices, n, static_cast<int>(length), inner);
    const int64_t elements = length * inner;
    launch(join_parts<S>, dim3(static_cast<unsigned>(ceil_div<int64_t>(elements, 256))), dim3(256), 0,
           table.data_as<S>(), parts.data<float>(), static_cast<int>(down), elements, inner, padding);
  };
  if (table.dtype() == DType::Float32)
    go(0.f);
  else if (table.dtype() == DType::BFloat16)
    go(__nv_bfloat16{});
  else
    go(__half{});
  return true;
}

}  // namespace vt::cuda
