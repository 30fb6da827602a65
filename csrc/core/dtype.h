// Element types, their sizes and names, and torch's promotion rules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace vt {

enum class DType : uint8_t {
  Bool,
  UInt8,
  Int8,
  Int16,
  Int32,
  Int64,
  Float16,
  BFloat16,
  Float32,
  Float64,
  Float8_e4m3fn,
  Float8_e5m2,
};
inline constexpr int kNumDTypes = 12;

/// 16-bit floats are storage types: kernels widen them to float, compute, and round once on store.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

float to_float(Half value);
Half to_half(float value);
inline float to_float(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}
inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

constexpr int64_t item_size(DType dtype) {
  constexpr int8_t sizes[kNumDTypes] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8, 1, 1};
  return sizes[static_cast<int>(dtype)];
}
constexpr bool is_floating(DType dtype) { return dtype >= DType::Float16; }
constexpr bool is_reduced_float(DType dtype) {
  return dtype == DType::Float16 || dtype == DType::BFloat16;
}
/// 8-bit floats are for storage and scaled products: elements are moved, filled, compared and
/// converted, and every other op refuses them.
constexpr bool is_float8(DType dtype) { return dtype >= DType::Float8_e4m3fn; }
/// True for the integer types, with or without bool.
constexpr bool is_integral(DType dtype, bool include_bool = false) {
  return !is_floating(dtype) && (include_bool || dtype != DType::Bool);
}
constexpr bool is_signed(DType dtype) { return dtype >= DType::Int8; }

/// "float32", "int64", … (torch prints them as "torch.float32").
std::string_view dtype_name(DType dtype);
/// "Float", "Long", …, as torch's errors name them.
std::string_view scalar_type_name(DType dtype);

/// torch.promote_types: the smallest type to which both convert safely. 8-bit floats have none with
/// another dtype: that raises, naming both.
DType promote_types(DType a, DType b);

/// torch.can_cast: false only for float→integer, anything→bool and signed→uint8 conversions.
bool can_cast(DType from, DType to);

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<bool> {
  static constexpr DType value = DType::Bool;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::UInt8;
};
template <>
struct DTypeOf<int8_t> {
  static constexpr DType value = DType::Int8;
};
template <>
struct DTypeOf<int16_t> {
  static constexpr DType value = DType::Int16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::Int32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::Int64;
};
template <>
struct DTypeOf<Half> {
  static constexpr DType value = DType::Float16;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::BFloat16;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::Float32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::Float64;
};

}  // namespace vt
