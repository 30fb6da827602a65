// Products of float32 on tensor cores without loss of precision: a number is split into two TF32
// numbers (10-bit mantissas), x = high + low / 8192, and of a product three terms are kept,
// high·high + (high·low + low·high) / 8192. What is left out is below 2^-21 |a b|: the low parts'
// product (2^-22) and the bits they lose (2^-23 each). `low` is scaled because it would underflow
// before x does; subnormal numbers lose at most their last bit.
//
// Tensor cores cut sums off (they do not round), so a chain of products is short: its small terms
// first, then the large ones, and what it gives is added to the result by ordinary additions.
// A number that is inf, NaN or near the end of the range gives NaN or inf.
//
// m16n8k8: with g = lane / 4 and t = lane % 4, a thread holds
//   of A (16 x 8): rows g, g + 8 of column t, then of column t + 4;
//   of B (8 x 8):  rows t, t + 4 of column g;
//   of C (16 x 8): columns 2t, 2t + 1 of rows g and g + 8.
// Source: PTX ISA, "Matrix fragments for mma.m16n8k8"; Ootomo and Yokota, "Recovering single
// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance",
// 2022.
#pragma once

#include <cstdint>

namespace vt::cuda {

inline constexpr float kLowScale = 8192.f;

/// N numbers as the operand of a tensor core: their high and low parts.
template <int N>
struct SplitPart {
  uint32_t high[N], low[N];

  __device__ void set(int i, float x) {
    const uint32_t rounded = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    high[i] = rounded;
    low[i] = __float_as_uint((x - __uint_as_float(rounded)) * kLowScale);
  }
};

/// c += a b.
__device__ inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// c = Σ a[k] b[k], K products of 8 columns each. Two chains, so that products wait less for one
/// another.
template <int K>
__device__ inline void multiply_split(float (&c)[4], const SplitPart<4> (&a)[K],
                                      const SplitPart<2> (&b)[K]) {
  float first[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = 0.f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    multiply_add_tf32(c, a[k].high, b[k].high);
    multiply_add_tf32(first, a[k].low, b[k].high);
    multiply_add_tf32(first, a[k].high, b[k].low);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += first[i] * (1.f / kLowScale);
}

}  // namespace vt::cuda
