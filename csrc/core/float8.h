// The 8-bit floats of the OCP specification. e4m3fn: 4 exponent bits, bias 7, no infinity, one NaN
// a sign (0x7f), largest value 448. e5m2: the upper byte of a half, largest value 57344.
//
// Rounding is to nearest even from float. As in torch, what is too large becomes 448 in e4m3fn,
// infinity too, and infinity in e5m2 from 61440 on; a NaN stays one and keeps its sign. The
// functions take the bits in both forms, so that loops over them vectorise and CUDA kernels share
// them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace vt {

struct Float8_e4m3fn {
  uint8_t bits;
};
struct Float8_e5m2 {
  uint8_t bits;
};

constexpr float float_of_e4m3(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80u) << 24;
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fu) << 20;
  // Moved into a float the value is off by 2^120, subnormals too, which one multiplication mends.
  const uint32_t finite =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p120f);
  return __builtin_bit_cast(float, sign | (magnitude == 0x07f00000u ? 0x7ff00000u : finite));
}

constexpr float float_of_e5m2(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80u) << 24;
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fu) << 21;
  const uint32_t finite =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  const uint32_t quiet = magnitude > 0x0f800000u ? 0x00400000u : 0u;
  return __builtin_bit_cast(
      float, sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u | quiet : finite));
}

/// Normal results round in the integer domain; subnormal ones by an addition whose sum has their
/// last place as its own.
constexpr uint8_t e4m3_of_float(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t a = bits & 0x7fffffffu;
  const uint32_t normal = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a < 0x3c800000u ? a : 0u) + 0x1p14f) -
      0x46800000u;
  uint32_t r = a < 0x3c800000u ? subnormal : normal;
  r = a > 0x43e00000u ? 0x7eu : r;  // beyond 448
  r = a > 0x7f800000u ? 0x7fu : r;
  return static_cast<uint8_t>(sign | r);
}

constexpr uint8_t e5m2_of_float(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t a = bits & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffffu + ((a >> 21) & 1u)) >> 21;
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a < 0x38800000u ? a : 0u) + 0x1p7f) -
      0x43000000u;
  uint32_t r = a < 0x38800000u ? subnormal : normal;
  r = a >= 0x47700000u ? 0x7cu : r;  // 61440 is half way to the first value beyond
  r = a > 0x7f800000u ? 0x7fu : r;
  return static_cast<uint8_t>(sign | r);
}

constexpr float to_float(Float8_e4m3fn value) { return float_of_e4m3(value.bits); }
constexpr float to_float(Float8_e5m2 value) { return float_of_e5m2(value.bits); }
/// A float as the 8-bit float `dtype`: its bits.
constexpr uint8_t float8_bits(float value, DType dtype) {
  return dtype == DType::Float8_e4m3fn ? e4m3_of_float(value) : e5m2_of_float(value);
}

}  // namespace vt
