// From a linear index to byte offsets of strided operands, with divisions by multiplication.
#pragma once

#include <cstdint>

#include "core/error.h"

namespace vt::cuda {

/// Division of a 31-bit number by a fixed one, by multiply and shift.
/// Source: Granlund & Montgomery, "Division by invariant integers using multiplication", 1994.
struct FastDivisor {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while (shift < 32 && (uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

inline constexpr int kMaxOffsetDims = 10;

/// Byte offsets of N operands in at most D dimensions. Dimension 0 moves fastest. At most 2^31 - 1
/// elements.
template <int N, int D = kMaxOffsetDims>
struct Offsets {
  int ndim = 0;
  FastDivisor extent[D];
  int64_t stride[N][D];

  __device__ void get(uint32_t index, int64_t (&offset)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) offset[i] = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (d == ndim) break;
      const uint32_t rest = extent[d].divide(index);
      const uint32_t here = index - rest * extent[d].divisor;
      index = rest;
#pragma unroll
      for (int i = 0; i < N; ++i) offset[i] += here * stride[i][d];
    }
  }
};

}  // namespace vt::cuda
