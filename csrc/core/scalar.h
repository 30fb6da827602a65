// A Python number on its way into an op: bool, int or float, with its category kept for promotion.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/error.h"

namespace vt {

class Scalar {
 public:
  enum class Kind : uint8_t { Bool, Int, Float };

  Scalar() : Scalar(int64_t{0}) {}
  Scalar(bool value) : kind_(Kind::Bool), int_(value) {}       // NOLINT
  Scalar(int value) : kind_(Kind::Int), int_(value) {}         // NOLINT
  Scalar(int64_t value) : kind_(Kind::Int), int_(value) {}     // NOLINT
  Scalar(double value) : kind_(Kind::Float), float_(value) {}  // NOLINT
  Scalar(float value) : kind_(Kind::Float), float_(value) {}   // NOLINT

  Kind kind() const { return kind_; }
  bool is_bool() const { return kind_ == Kind::Bool; }
  bool is_int() const { return kind_ == Kind::Int; }
  bool is_float() const { return kind_ == Kind::Float; }
  double to_double() const { return is_float() ? float_ : static_cast<double>(int_); }
  int64_t to_int() const { return is_float() ? static_cast<int64_t>(float_) : int_; }
  bool to_bool() const { return is_float() ? float_ != 0 : int_ != 0; }
  /// The value as element type T (16-bit floats are computed as float, so T is float for them).
  template <class T>
  T to() const {
    if constexpr (std::is_same_v<T, bool>)
      return to_bool();
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(to_double());
    else
      return static_cast<T>(to_int());
  }
  /// The dtype a 0-d tensor made from it has, given the default floating dtype.
  DType dtype(DType default_float = DType::Float32) const {
    return is_bool() ? DType::Bool : is_int() ? DType::Int64 : default_float;
  }
  friend bool operator==(const Scalar& a, const Scalar& b) {
    return a.kind_ == b.kind_ && (a.is_float() ? a.float_ == b.float_ : a.int_ == b.int_);
  }

 private:
  Kind kind_;
  union {
    int64_t int_;
    double float_;
  };
};

/// Throws where `dtype` does not hold the value: an integer past its range (but a negative number
/// wraps to an unsigned one), nan as an integer, a float that would become infinite.
void check_in_range(const Scalar& value, DType dtype);
inline void check_fits(const Scalar& value, DType dtype) {
  if (!value.is_float() && value.to_int() >= 0 && value.to_int() <= 127) [[likely]]
    return;  // every dtype has these
  check_in_range(value, dtype);
}

inline void append(std::string& out, const Scalar& value) {
  if (value.is_bool())
    append(out, value.to_bool());
  else if (value.is_int())
    append(out, value.to_int());
  else
    append(out, value.to_double());
}

}  // namespace vt
