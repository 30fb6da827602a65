#include "core/dtype.h"

#include <cstring>

#include "core/error.h"

namespace vt {

float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  uint32_t mantissa = value.bits & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    // Subnormal: mantissa * 2^-24 is exact in float.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    bits = sign | __builtin_bit_cast(uint32_t, magnitude);
  }
  return __builtin_bit_cast(float, bits);
}

Half to_half(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  }
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65536
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 lets the float unit round to nearest even at 2^-24.
    const float rounded = __builtin_bit_cast(float, magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, rounded) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

std::string_view dtype_name(DType dtype) {
  constexpr std::string_view names[kNumDTypes] = {
      "bool",    "uint8",    "int8",    "int16",   "int32",         "int64",
      "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"};
  return names[static_cast<int>(dtype)];
}

std::string_view scalar_type_name(DType dtype) {
  constexpr std::string_view names[kNumDTypes] = {
      "Bool", "Byte",     "Char",  "Short",  "Int",           "Long",
      "Half", "BFloat16", "Float", "Double", "Float8_e4m3fn", "Float8_e5m2"};
  return names[static_cast<int>(dtype)];
}

DType promote_types(DType a, DType b) {
  if (a == b) return a;
  if (is_float8(a) || is_float8(b)) {
    fail("Promotion for Float8 Types is not supported, attempted to promote ", scalar_type_name(a),
         " and ", scalar_type_name(b), "; convert with .to(dtype) first");
  }
  if (a > b) {
    const DType t = a;
    a = b;
    b = t;
  }
  // a < b in declaration order: bool < uint8 < signed ints < half < bfloat16 < float < double.
  if (a == DType::Float16 && b == DType::BFloat16) return DType::Float32;
  if (a == DType::UInt8 && b == DType::Int8) return DType::Int16;
  return b;
}

bool can_cast(DType from, DType to) {
  if (is_floating(from) && !is_floating(to)) return false;
  if (from != DType::Bool && to == DType::Bool) return false;
  return true;
}

}  // namespace vt
