// Arrays of bfloat16 and float16, stored as uint16_t, and of 8-bit floats (core/float8.h), to and
// from float. Rounding is to nearest even; a NaN stays a NaN (its quiet bit set), overflow gives
// infinity. `out` and `in` do not overlap.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "core/float8.h"

namespace vt::cpu::VT_ISA {

[[gnu::always_inline]] inline float f32_of_bf16(uint16_t x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

[[gnu::always_inline]] inline uint16_t bf16_of_f32(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const uint32_t quiet = (b >> 16) | 0x40;
  return static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/// The bits of the half moved into a float are off by a power of two, which one multiplication
/// mends, subnormals included; only infinity and NaN need their exponent set.
[[gnu::always_inline]] inline float f32_of_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t finite =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * std::bit_cast<float>(0x77800000u));
  const uint32_t quiet = magnitude > 0x0f800000 ? 0x00400000 : 0;
  return std::bit_cast<float>(sign |
                              (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 | quiet : finite));
}

/// Normal results round in the integer domain; subnormal ones by an addition whose sum has the
/// half's last place as its own.
[[gnu::always_inline]] inline uint16_t f16_of_f32(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (b >> 16) & 0x8000;
  const uint32_t a = b & 0x7fffffff;
  const uint32_t normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000;
  const uint32_t quiet = 0x7e00 | ((a >> 13) & 0x3ff);
  uint32_t r = a < 0x38800000 ? subnormal : normal;
  r = a >= 0x477ff000 ? 0x7c00 : r;
  r = a > 0x7f800000 ? quiet : r;
  return static_cast<uint16_t>(sign | r);
}

inline void f32_from_bf16(float* __restrict out, const uint16_t* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_of_bf16(in[i]);
}

inline void bf16_from_f32(uint16_t* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_of_f32(in[i]);
}

inline void f32_from_float8(float* __restrict out, const uint8_t* __restrict in, int64_t n,
                            DType from) {
  if (from == DType::Float8_e4m3fn)
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_e4m3(in[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_e5m2(in[i]);
}

inline void float8_from_f32(uint8_t* __restrict out, const float* __restrict in, int64_t n,
                            DType to) {
  if (to == DType::Float8_e4m3fn)
    for (int64_t i = 0; i < n; ++i) out[i] = e4m3_of_float(in[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = e5m2_of_float(in[i]);
}

inline void f32_from_f16(float* __restrict out, const uint16_t* __restrict in, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    _mm512_storeu_ps(out + i, _mm512_maskz_cvtph_ps(0xffff, half));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) out[i] = f32_of_f16(in[i]);
}

inline void f16_from_f32(uint16_t* __restrict out, const float* __restrict in, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    // The maskz form: GCC 12 warns of an uninitialised value inside the plain one.
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), half);
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < n; ++i) out[i] = f16_of_f32(in[i]);
}

}  // namespace vt::cpu::VT_ISA
