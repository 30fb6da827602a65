// Exponentials, logarithms, powers and hyperbolic functions. Like all of vec_math: branch-free
// float code that the compiler vectorises over a loop; polynomials are least-maximum-error fits.
// Where float arithmetic would need error-compensated pairs the function computes in double, which
// costs as much and is simpler. Built without -ffast-math: the rounding tricks rely on that.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if !defined(VT_ISA)
#error "compile with -DVT_ISA=base, v3 or v4"
#endif

namespace vt::cpu::VT_ISA {

namespace vec {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Adding one of these rounds to the nearest integer and leaves it in the low bits of the sum.
inline constexpr float kRound = 0x1.8p23f;
inline constexpr double kRoundDouble = 0x1.8p52;

[[gnu::always_inline]] inline uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
[[gnu::always_inline]] inline uint64_t bits(double x) { return std::bit_cast<uint64_t>(x); }
[[gnu::always_inline]] inline float from_bits(uint32_t x) { return std::bit_cast<float>(x); }
[[gnu::always_inline]] inline double from_bits(uint64_t x) { return std::bit_cast<double>(x); }

/// 2^n for -126 <= n <= 127.
[[gnu::always_inline]] inline float power_of_two(int32_t n) {
  return from_bits((static_cast<uint32_t>(n) + 127) << 23);
}

/// y * 2^n for -150 <= n <= 128, rounded once also where the result is subnormal.
[[gnu::always_inline]] inline float scale(float y, int32_t n) {
  const int32_t half = n >> 1;
  return y * power_of_two(half) * power_of_two(n - half);
}

struct ExpParts {
  float y;  // e^x (or 2^x) = y * 2^n
  int32_t n;
};
[[gnu::always_inline]] inline ExpParts exp_parts(float x) {
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts, the first short enough for an exact product without FMA.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float q = 0.0013938636f;
  q = q * r + 0.008369662f;
  q = q * r + 0.041666426f;
  q = q * r + 0.16666512f;
  q = q * r + 0.5f;
  return {1.0f + (r + r * r * q), static_cast<int32_t>(bits(shifted) - bits(kRound))};
}

/// e^x for |x| <= 87: no overflow, no subnormal.
[[gnu::always_inline]] inline float exp_in_range(float x) {
  const ExpParts e = exp_parts(x);
  return e.y * power_of_two(e.n);
}

[[gnu::always_inline]] inline ExpParts exp2_parts(float x) {
  const float shifted = x + kRound;
  const float r = x - (shifted - kRound);
  float q = 0.00015633574f;
  q = q * r + 0.0013392613f;
  q = q * r + 0.009617405f;
  q = q * r + 0.055503562f;
  q = q * r + 0.24022657f;
  q = q * r + 0.6931472f;
  return {1.0f + r * q, static_cast<int32_t>(bits(shifted) - bits(kRound))};
}
/// 2^x for |x| <= 126.
[[gnu::always_inline]] inline float exp2_in_range(float x) {
  const ExpParts e = exp2_parts(x);
  return e.y * power_of_two(e.n);
}

/// log x for normal finite x > 0, plus extra_exponent * log 2.
[[gnu::always_inline]] inline float log_normal(float x, int32_t extra_exponent = 0) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  const int32_t e = static_cast<int32_t>(bits(x) - kSqrtHalf) >> 23;
  const float f = from_bits(bits(x) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float q = 0.06790063f;
  q = q * f - 0.1172469f;
  q = q * f + 0.1189499f;
  q = q * f - 0.12397553f;
  q = q * f + 0.14217508f;
  q = q * f - 0.16668409f;
  q = q * f + 0.20002243f;
  q = q * f - 0.25000003f;
  q = q * f + 0.3333331f;
  const float n = static_cast<float>(e + extra_exponent);
  const float square = f * f;
  const float low = square * (f * q - 0.5f) + n * -2.12194440e-4f;
  return n * 0.693359375f + (f + low);
}

// The double versions are good to about 1e-13 relative: exact after rounding to float.

struct ExpParts64 {
  double m;      // e^x = power * (1 + m)
  double power;  // 2^n
};
/// |x| <= 700.
[[gnu::always_inline]] inline ExpParts64 exp_parts64(double x) {
  const double shifted = x * 1.4426950408889634 + kRoundDouble;
  const double n = shifted - kRoundDouble;
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double q = 2.7642008497195127e-06;
  q = q * r + 2.4877667006411704e-05;
  q = q * r + 0.00019841168107298892;
  q = q * r + 0.0013888818941949852;
  q = q * r + 0.008333333384194954;
  q = q * r + 0.041666666904777584;
  q = q * r + 0.16666666666574548;
  q = q * r + 0.4999999999978103;
  q = q * r + 1.000000000000002;
  return {r * q, from_bits((bits(shifted) + 1023) << 52)};
}
[[gnu::always_inline]] inline double exp64(double x) {
  const ExpParts64 e = exp_parts64(x);
  return e.power + e.power * e.m;
}
[[gnu::always_inline]] inline double expm1_64(double x) {
  const ExpParts64 e = exp_parts64(x);
  return e.power * e.m + (e.power - 1.0);
}

struct LogParts64 {
  double exponent;
  double log_mantissa;  // log x = exponent * log 2 + log_mantissa
};
/// Normal finite x > 0.
[[gnu::always_inline]] inline LogParts64 log_parts64(double x) {
  constexpr uint64_t kOne = 0x3ff0000000000000;
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const uint64_t biased = (bits(x) + (kOne - kSqrtHalf)) >> 52;
  const double m = from_bits(bits(x) - (biased << 52) + kOne);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double q = 0.19612510987349208;
  q = q * z + 0.2217394758981903;
  q = q * z + 0.28572173359005654;
  q = q * z + 0.3999999482206685;
  q = q * z + 0.6666666667981065;
  q = q * z + 1.9999999999999438;
  // An integer below 2^52 as a double, without the conversion that AVX2 lacks.
  return {from_bits(biased | 0x4330000000000000) - (0x1p52 + 1023), s * q};
}
/// The values of log and its kin at 0, infinity, NaN and below 0; `y` elsewhere.
template <class T>
[[gnu::always_inline]] inline T log_special(T x, T y) {
  y = x < std::numeric_limits<T>::infinity() ? y : x;
  const T not_positive =
      x == 0 ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN();
  return x > 0 ? y : not_positive;
}
/// log(1 + x) for x > -1, with the rounding error of 1 + x put back in.
[[gnu::always_inline]] inline double log1p64(double x) {
  const double u = 1.0 + x;
  const LogParts64 l = log_parts64(u);
  const double error = (x - (u - 1.0)) / u;
  return log_special(u, l.exponent * 0.6931471805599453 + (l.log_mantissa + error));
}

/// 2^x for |x| <= 1000.
[[gnu::always_inline]] inline double exp2_64(double x) {
  const double shifted = x + kRoundDouble;
  const ExpParts64 e = exp_parts64((x - (shifted - kRoundDouble)) * 0.6931471805599453);
  const double power = e.power * from_bits((bits(shifted) + 1023) << 52);
  return power + power * e.m;
}

}  // namespace vec

// --- exp

[[gnu::always_inline]] inline float vexp(float x) {
  x = x > 89.0f ? 89.0f : x;  // a NaN passes both
  x = x < -104.0f ? -104.0f : x;
  const vec::ExpParts e = vec::exp_parts(x);
  return vec::scale(e.y, e.n);
}

[[gnu::always_inline]] inline float vexp2(float x) {
  x = x > 128.0f ? 128.0f : x;
  x = x < -150.0f ? -150.0f : x;
  const vec::ExpParts e = vec::exp2_parts(x);
  return vec::scale(e.y, e.n);
}

[[gnu::always_inline]] inline float vexpm1(float x) {
  double a = x > 90.0f ? 90.0f : x;
  a = a < -40.0 ? -40.0 : a;
  return std::copysign(static_cast<float>(vec::expm1_64(a)), x);  // the sign is for -0
}

// --- log

[[gnu::always_inline]] inline float vlog(float x) {
  const bool subnormal = x < std::numeric_limits<float>::min();
  const float normal = subnormal ? x * 0x1p23f : x;
  return vec::log_special(x, vec::log_normal(normal, subnormal ? -23 : 0));
}

[[gnu::always_inline]] inline float vlog2(float x) {
  const vec::LogParts64 l = vec::log_parts64(x);
  return vec::log_special(x, static_cast<float>(l.exponent + l.log_mantissa * 1.4426950408889634));
}

[[gnu::always_inline]] inline float vlog10(float x) {
  const vec::LogParts64 l = vec::log_parts64(x);
  return vec::log_special(x, static_cast<float>(l.exponent * 0.30102999566398120 +
                                                l.log_mantissa * 0.43429448190325183));
}

[[gnu::always_inline]] inline float vlog1p(float x) {
  const float u = 1.0f + x;
  const float error = (x - (u - 1.0f)) / u;
  const float y = vec::log_special(u, vec::log_normal(u) + error);
  return std::copysign(y, x);
}

// --- pow, in double: log2 x to 1e-13 leaves y * log2 x good to 1e-11 where the result is finite

[[gnu::always_inline]] inline float vpow(float x, float y) {
  const float a = std::fabs(x);
  const double yd = y;
  const vec::LogParts64 l = vec::log_parts64(a);
  const double log2a =
      vec::log_special<double>(a, l.exponent + l.log_mantissa * 1.4426950408889634);
  double t = yd * log2a;
  t = t > 200.0 ? 200.0 : t;
  t = t < -200.0 ? -200.0 : t;
  float r = static_cast<float>(vec::exp2_64(t));
  // A negative base: the sign of an odd y, NaN for a fraction. From 2^24 on floats are even.
  const double whole = (yd + vec::kRoundDouble) - vec::kRoundDouble;
  const double half = yd * 0.5;
  const double whole_half = (half + vec::kRoundDouble) - vec::kRoundDouble;
  const bool large = std::fabs(y) >= 0x1p24f;
  const bool integer = large | (whole == yd);
  const bool odd = !large & integer & (whole_half != half);
  const bool negative = vec::bits(x) >> 31;
  r = (negative & odd) ? -r : r;
  r = ((x < 0.0f) & !integer & (a < vec::kInf)) ? vec::kNaN : r;
  r = ((x == -1.0f) & (std::fabs(y) == vec::kInf)) ? 1.0f : r;
  return ((x == 1.0f) | (y == 0.0f)) ? 1.0f : r;
}

// --- hyperbolic

[[gnu::always_inline]] inline float vtanh(float x) {
  const float a = std::fabs(x);
  const float z = x * x;
  float q = -0.0061788997f;
  q = q * z + 0.02100631f;
  q = q * z - 0.053836953f;
  q = q * z + 0.13332444f;
  q = q * z - 0.33333313f;
  const float near_zero = a + a * z * q;
  const float bounded = a > 10.0f ? 10.0f : a;
  const float away = 1.0f - 2.0f / (vec::exp_in_range(2.0f * bounded) + 1.0f);
  return std::copysign(a < 0.5625f ? near_zero : away, x);
}

[[gnu::always_inline]] inline float vsinh(float x) {
  const float a = std::fabs(x);
  const double m = vec::expm1_64(a > 100.0f ? 100.0f : a);
  return std::copysign(static_cast<float>(0.5 * (m + m / (m + 1.0))), x);
}

[[gnu::always_inline]] inline float vcosh(float x) {
  const float a = std::fabs(x);
  const double e = vec::exp64(a > 100.0f ? 100.0f : a);
  return static_cast<float>(0.5 * (e + 1.0 / e));
}

[[gnu::always_inline]] inline float vasinh(float x) {
  const double a = std::fabs(x);
  const double r = vec::log1p64(a + a * a / (1.0 + std::sqrt(a * a + 1.0)));
  return std::copysign(std::fabs(x) < vec::kInf ? static_cast<float>(r) : std::fabs(x), x);
}

[[gnu::always_inline]] inline float vacosh(float x) {
  const double t = static_cast<double>(x) - 1.0;
  const float r = static_cast<float>(vec::log1p64(t + std::sqrt(t * (t + 2.0))));
  return x >= 1.0f ? r : vec::kNaN;
}

[[gnu::always_inline]] inline float vatanh(float x) {
  const double a = std::fabs(x);
  return std::copysign(static_cast<float>(0.5 * vec::log1p64(2.0 * a / (1.0 - a))), x);
}

// --- double: the C library's

inline double vexp(double x) { return std::exp(x); }
inline double vexp2(double x) { return std::exp2(x); }
inline double vexpm1(double x) { return std::expm1(x); }
inline double vlog(double x) { return std::log(x); }
inline double vlog2(double x) { return std::log2(x); }
inline double vlog10(double x) { return std::log10(x); }
inline double vlog1p(double x) { return std::log1p(x); }
inline double vpow(double x, double y) { return std::pow(x, y); }
inline double vtanh(double x) { return std::tanh(x); }
inline double vsinh(double x) { return std::sinh(x); }
inline double vcosh(double x) { return std::cosh(x); }
inline double vasinh(double x) { return std::asinh(x); }
inline double vacosh(double x) { return std::acosh(x); }
inline double vatanh(double x) { return std::atanh(x); }

}  // namespace vt::cpu::VT_ISA
