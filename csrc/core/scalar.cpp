#include "core/scalar.h"

#include <limits>
#include <string_view>

#include "core/largest_finite.h"

namespace vt {
namespace {

std::string_view element_type(DType dtype) {
  constexpr std::string_view names[kNumDTypes] = {
      "bool", "uint8_t",  "int8_t", "int16_t", "int",           "int64_t",
      "Half", "BFloat16", "float",  "double",  "Float8_e4m3fn", "Float8_e5m2"};
  return names[static_cast<int>(dtype)];
}

struct Range {
  int64_t low, high;
};
Range range_of(DType dtype) {
  switch (dtype) {
    case DType::UInt8:
      return {0, 255};
    case DType::Int8:
      return {-128, 127};
    case DType::Int16:
      return {-32768, 32767};
    case DType::Int32:
      return {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
    default:
      return {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
  }
}

bool in_range(const Scalar& value, DType dtype) {
  if (dtype == DType::Bool) return true;
  if (is_floating(dtype)) {
    const double x = value.to_double();
    if (x != x || (std::isinf(x) && dtype != DType::Float8_e4m3fn)) return true;
    return std::abs(x) <= largest_finite(dtype);
  }
  const Range range = range_of(dtype);
  if (value.is_float()) {
    // 2^63 is no int64_t, though it is what the largest one becomes as a double.
    const double x = value.to_double();
    return x >= static_cast<double>(range.low) && x <= static_cast<double>(range.high) &&
           x < 0x1p63;
  }
  // A negative integer wraps to an unsigned one, as in C.
  const int64_t low = dtype == DType::UInt8 ? -range.high : range.low;
  return value.to_int() >= low && value.to_int() <= range.high;
}

}  // namespace

void check_in_range(const Scalar& value, DType dtype) {
  check(in_range(value, dtype), "value cannot be converted to type ", element_type(dtype),
        " without overflow: ", value);
}

}  // namespace vt
