// Trigonometric functions and their inverses.
#pragma once

#include "cpu/kernels/vec_math_exp.h"

namespace vt::cpu::VT_ISA {

namespace vec {

/// From here on the argument needs more bits of pi than the fast reduction carries.
inline constexpr float kTrigLimit = 0x1p20f;

struct Quadrant {
  float r;     // in about [-pi/4, pi/4]
  uint32_t n;  // x = r + n * pi/2
};
/// |x| < kTrigLimit. The subtraction is done in double, with pi/2 in two parts.
[[gnu::always_inline]] inline Quadrant quadrant(float x) {
  const float shifted = x * 0.636619772f + kRound;
  const double n = shifted - kRound;
  const double r = (static_cast<double>(x) - n * 0x1.921fb544p0) - n * 0x1.0b4611a626331p-34;
  return {static_cast<float>(r), bits(shifted)};
}
[[gnu::always_inline]] inline float sin_quadrant(float r) {
  const float z = r * r;
  float q = 2.7522328e-06f;
  q = q * z - 0.0001984532f;
  q = q * z + 0.008333362f;
  q = q * z - 0.16666667f;
  return std::copysign(r + r * z * q, r);  // the sign is for -0
}
[[gnu::always_inline]] inline float cos_quadrant(float r) {
  const float z = r * r;
  float q = -2.7827937e-07f;
  q = q * z + 2.4811017e-05f;
  q = q * z - 0.0013888952f;
  q = q * z + 0.041666668f;
  return 1.0f - (0.5f * z - z * z * q);
}

[[gnu::always_inline]] inline float sin_in_range(float x) {
  const Quadrant p = quadrant(x);
  const float y = (p.n & 1) != 0 ? cos_quadrant(p.r) : sin_quadrant(p.r);
  return from_bits(bits(y) ^ ((p.n & 2) << 30));
}
[[gnu::always_inline]] inline float cos_in_range(float x) {
  const Quadrant p = quadrant(x);
  const float y = (p.n & 1) != 0 ? sin_quadrant(p.r) : cos_quadrant(p.r);
  return from_bits(bits(y) ^ (((p.n + 1) & 2) << 30));
}
[[gnu::always_inline]] inline float tan_in_range(float x) {
  const Quadrant p = quadrant(x);
  const float s = sin_quadrant(p.r);
  const float c = cos_quadrant(p.r);
  const bool odd = (p.n & 1) != 0;
  return (odd ? -c : s) / (odd ? s : c);
}

/// Blocks whose arguments are all moderate take the vector path. `out` may be `in`.
template <class Fast, class Any>
inline void by_trig_range(float* out, const float* in, int64_t n, const Fast& fast,
                          const Any& any) {
  constexpr int64_t kBlock = 256;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = first + kBlock < n ? first + kBlock : n;
    uint32_t largest = 0;
    for (int64_t i = first; i < last; ++i) {
      const uint32_t magnitude = bits(in[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < bits(kTrigLimit)) {
#pragma GCC ivdep
      for (int64_t i = first; i < last; ++i) out[i] = fast(in[i]);
    } else {
      for (int64_t i = first; i < last; ++i) out[i] = any(in[i]);
    }
  }
}

/// sqrt(z) and the arcsine of it for z in [0, 1/4]
[[gnu::always_inline]] inline float asin_polynomial(float s, float z) {
  float q = 0.037600663f;
  q = q * z + 0.01437479f;
  q = q * z + 0.03182587f;
  q = q * z + 0.044514578f;
  q = q * z + 0.07500518f;
  q = q * z + 0.1666666f;
  return s + s * z * q;
}
/// atan t for t in [0, 1].
[[gnu::always_inline]] inline float atan_unit(float t) {
  const float z = t * t;
  float q = -0.001825803f;
  q = q * z + 0.011057849f;
  q = q * z - 0.031442773f;
  q = q * z + 0.05822075f;
  q = q * z - 0.084185906f;
  q = q * z + 0.1095725f;
  q = q * z - 0.14265175f;
  q = q * z + 0.19998631f;
  q = q * z - 0.33333302f;
  return t + t * z * q;
}

inline constexpr float kPi = 3.14159265f;
inline constexpr float kPiLow = -8.74227766e-8f;  // pi - kPi
inline constexpr float kHalfPi = 1.57079633f;
inline constexpr float kHalfPiLow = -4.37113883e-8f;

}  // namespace vec

// --- sin, cos, tan. The scalar forms are right for any argument but hold a branch, so loops over
// them are not vectorised: use the array forms, or vec::*_in_range where the range is known.

inline float vsin(float x) {
  return std::fabs(x) < vec::kTrigLimit ? vec::sin_in_range(x) : std::sin(x);
}
inline float vcos(float x) {
  return std::fabs(x) < vec::kTrigLimit ? vec::cos_in_range(x) : std::cos(x);
}
inline float vtan(float x) {
  return std::fabs(x) < vec::kTrigLimit ? vec::tan_in_range(x) : std::tan(x);
}
inline double vsin(double x) { return std::sin(x); }
inline double vcos(double x) { return std::cos(x); }
inline double vtan(double x) { return std::tan(x); }

/// out[i] = sin(in[i]); `out` is `in` or does not overlap it. So for the next ones.
inline void vsin_n(float* out, const float* in, int64_t n) {
  vec::by_trig_range(
      out, in, n, [](float x) __attribute__((always_inline)) { return vec::sin_in_range(x); },
      [](float x) { return vsin(x); });
}
inline void vcos_n(float* out, const float* in, int64_t n) {
  vec::by_trig_range(
      out, in, n, [](float x) __attribute__((always_inline)) { return vec::cos_in_range(x); },
      [](float x) { return vcos(x); });
}
inline void vtan_n(float* out, const float* in, int64_t n) {
  vec::by_trig_range(
      out, in, n, [](float x) __attribute__((always_inline)) { return vec::tan_in_range(x); },
      [](float x) { return vtan(x); });
}
inline void vsin_n(double* out, const double* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::sin(in[i]);
}
inline void vcos_n(double* out, const double* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::cos(in[i]);
}
inline void vtan_n(double* out, const double* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::tan(in[i]);
}

// --- inverses

[[gnu::always_inline]] inline float vasin(float x) {
  const float a = std::fabs(x);
  const bool upper = a > 0.5f;  // asin a = pi/2 - 2 asin sqrt((1 - a) / 2)
  const float z = upper ? 0.5f * (1.0f - a) : a * a;
  const float p = vec::asin_polynomial(upper ? std::sqrt(z) : a, z);
  const float y = upper ? vec::kHalfPi - (2.0f * p - vec::kHalfPiLow) : p;
  return std::copysign(y, x);
}

[[gnu::always_inline]] inline float vacos(float x) {
  const float a = std::fabs(x);
  const bool upper = a > 0.5f;
  const float z = upper ? 0.5f * (1.0f - a) : a * a;
  const float p = vec::asin_polynomial(upper ? std::sqrt(z) : a, z);
  const float signed_p = std::copysign(p, x);
  const float middle = vec::kHalfPi - (signed_p - vec::kHalfPiLow);
  const float outer = x > 0.0f ? 2.0f * p : vec::kPi - (2.0f * p - vec::kPiLow);
  return upper ? outer : middle;
}

[[gnu::always_inline]] inline float vatan(float x) {
  const float a = std::fabs(x);
  const bool upper = a > 1.0f;
  const float p = vec::atan_unit(upper ? 1.0f / a : a);
  return std::copysign(upper ? vec::kHalfPi - (p - vec::kHalfPiLow) : p, x);
}

[[gnu::always_inline]] inline float vatan2(float y, float x) {
  const float ay = std::fabs(y);
  const float ax = std::fabs(x);
  const bool steep = ay > ax;
  const float large = steep ? ay : ax;
  const float small = steep ? ax : ay;
  float t = small / large;
  t = large == 0.0f ? 0.0f : t;       // atan2(±0, ±0) counts as on the x axis
  t = small == vec::kInf ? 1.0f : t;  // both infinite: the diagonal
  float p = vec::atan_unit(t);
  p = steep ? vec::kHalfPi - (p - vec::kHalfPiLow) : p;
  const bool left = vec::bits(x) >> 31;
  p = left ? vec::kPi - (p - vec::kPiLow) : p;
  const float r = std::copysign(p, y);
  return ((x != x) | (y != y)) ? vec::kNaN : r;
}

inline double vasin(double x) { return std::asin(x); }
inline double vacos(double x) { return std::acos(x); }
inline double vatan(double x) { return std::atan(x); }
inline double vatan2(double y, double x) { return std::atan2(y, x); }

}  // namespace vt::cpu::VT_ISA
