// Sliding windows over the planes of (N, C, H, W): geometry, and one thread an element.
#pragma once

#include "cuda/kernels/rows.cuh"

namespace vt::cuda::windows {

inline constexpr int kThreads = 256;

inline int64_t at(IntSpan values, size_t i) { return values[values.size() == 1 ? 0 : i]; }

struct Windows {
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];

  Windows(IntSpan in_sizes, IntSpan out_sizes, IntSpan k, IntSpan s, IntSpan p, IntSpan d) {
    for (size_t i = 0; i < 2; ++i) {
      in[i] = in_sizes[in_sizes.size() - 2 + i];
      out[i] = out_sizes[out_sizes.size() - 2 + i];
      kernel[i] = at(k, i);
      stride[i] = at(s.empty() ? k : s, i);
      padding[i] = at(p, i);
      dilation[i] = at(d, i);
    }
  }
  __host__ __device__ int64_t in_area() const { return in[0] * in[1]; }
  __host__ __device__ int64_t out_area() const { return out[0] * out[1]; }
  __host__ __device__ int64_t taps() const { return kernel[0] * kernel[1]; }
  /// Where element `tap` of window `o` lies in the input; outside it in the padding.
  __device__ int64_t place(int i, int64_t o, int64_t tap) const {
    return o * stride[i] - padding[i] + tap * dilation[i];
  }
};

/// Blocks of kThreads for `n` elements, each thread going on by the grid's size.
inline dim3 element_grid(const Launch& launch, int64_t n) {
  return dim3(
      static_cast<unsigned>(launch.fill(ceil_div<int64_t>(n, kThreads), kThreads, 16)));
}
__device__ inline int64_t first_element() {
  return int64_t{blockIdx.x} * kThreads + threadIdx.x;
}
__device__ inline int64_t element_step() { return int64_t{gridDim.x} * kThreads; }

}  // namespace vt::cuda::windows
