// Attention over long sequences on Hopper GPUs: what forward and backward share.
#pragma once

#include "core/kernel_switches.h"
#include "cuda/cudnn.h"
#include "cuda/kernels/attention_head.cuh"
#include "cuda/kernels/attention_long.h"
#include "cuda/kernels/hopper.cuh"
#include "cuda/tensor_map.h"

namespace vt::cuda::attention {

using namespace hopper;

#ifdef VT_BUILT_FOR_HOPPER
inline constexpr bool kBuiltForHopper = true;
#else
inline constexpr bool kBuiltForHopper = false;  // no code for sm_90a
#endif
inline constexpr int kRows = 128;  // of keys or queries at a time
inline constexpr int kLongThreads = 3 * kWarpgroup;
inline constexpr uint32_t kHalf = 64 * 128, kOperandBytes = 2 * kHalf;

/// Sums as left operands, 16 columns each.
template <class S>
__device__ inline void pack_sums(uint32_t (&left)[4][4], const Sums& sums) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    left[k][0] = pack<S>(sums[2 * k][0], sums[2 * k][1]);
    left[k][1] = pack<S>(sums[2 * k][2], sums[2 * k][3]);
    left[k][2] = pack<S>(sums[2 * k + 1][0], sums[2 * k + 1][1]);
    left[k][3] = pack<S>(sums[2 * k + 1][2], sums[2 * k + 1][3]);
  }
}

/// Thread i of four gets what the four have at place i.
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int n = 0; n < 4; n += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? x[n] : x[n + 1], 1);
    x[n] = odd ? got : x[n];
    x[n + 1] = odd ? x[n + 1] : got;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? x[n] : x[n + 2], 2);
    x[n] = upper ? got : x[n];
    x[n + 2] = upper ? x[n + 2] : got;
  }
}

/// Writes a warpgroup's 64 rows from `to` on, scaled. kStream: the L2 cache gives their place to
/// others first.
template <class S, bool kStream = false>
__device__ inline void write_sums(S* to, int64_t stride, const Sums& sums, float scale) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float (&pair)[4] = sums[half * 4 + n];
        x[n] = pack<S>(pair[2 * r] * scale, pair[2 * r + 1] * scale);
      }
      transpose_quad(x);
      auto* const at =
          reinterpret_cast<uint4*>(to + (row + 8 * r) * stride + half * 32 + lane % 4 * 8);
      const uint4 piece = make_uint4(x[0], x[1], x[2], x[3]);
      if constexpr (kStream)
        __stcs(at, piece);
      else
        *at = piece;
    }
  }
}

/// Whether the kernels take operands of these shapes here, and cuDNN's alone were not asked for.
inline bool long_shapes(const Launch& launch, const Tensor& query, const Tensor& key,
                        const Tensor& value) {
  const auto q = query.sizes(), k = key.sizes();
  return kBuiltForHopper && launch.properties().major == 9 &&
         !kernel_switch(KernelSwitch::CudnnSmallAttention) && q[3] == kHeadWidth &&
         value.sizes()[3] == kHeadWidth && q[2] == k[2] && q[2] % kRows == 0 && k[1] > 0 &&
         q[1] % k[1] == 0 && q[0] * q[1] < (int64_t{1} << 16) &&
         q[0] * q[1] * q[2] < (int64_t{1} << 30);
}
/// Whether cuDNN's kernels are not to be had.
inline bool without_cudnn() {
  return !kernel_switch(KernelSwitch::CudnnEnabled) ||
         !kernel_switch(KernelSwitch::CudnnAttention) || !cudnn_available();
}

}  // namespace vt::cuda::attention
