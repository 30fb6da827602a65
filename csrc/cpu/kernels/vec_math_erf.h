// The error function.
#pragma once

#include "cpu/kernels/vec_math_exp.h"

namespace vt::cpu::VT_ISA {

namespace vec {

inline constexpr float kErfSplit = 0.875f;

/// erf a for 0 <= a <= kErfSplit.
[[gnu::always_inline]] inline float erf_near_zero(float a) {
  const float z = a * a;
  float q = 8.3922685e-05f;
  q = q * z - 0.0008144158f;
  q = q * z + 0.005200722f;
  q = q * z - 0.026859023f;
  q = q * z + 0.112836815f;
  q = q * z - 0.37612632f;
  q = q * z + 0.12837917f;
  return a + a * q;
}
/// 1 - erf a for a >= kErfSplit, to 1e-8 absolute: the exponential of a polynomial, which goes to
/// minus infinity beyond the fitted interval too.
[[gnu::always_inline]] inline float erf_complement(float a) {
  float q = -1.6145626e-05f;
  q = q * a + 0.00036682622f;
  q = q * a - 0.0037904442f;
  q = q * a + 0.023977788f;
  q = q * a - 0.106309995f;
  q = q * a - 0.63530415f;
  q = q * a - 1.1284767f;
  q = q * a - 5.2642295e-05f;
  return exp_in_range(q < -80.0f ? -80.0f : q);
}

}  // namespace vec

[[gnu::always_inline]] inline float verf(float x) {
  const float a = std::fabs(x);
  const float bounded = a > 5.0f ? 5.0f : a;
  const float y = a < vec::kErfSplit ? vec::erf_near_zero(a) : 1.0f - vec::erf_complement(bounded);
  return std::copysign(y, x);
}

/// exp(-x^2) times a polynomial in 1 / (1 + |x| / 2), in double: relative accuracy into the tail.
[[gnu::always_inline]] inline float verfc(float x) {
  const float bounded = std::fabs(x) > 10.5f ? 10.5f : std::fabs(x);
  const double a = bounded;
  const double t = 2.0 / (2.0 + a);
  double q = -0.03450552905501068;
  q = q * t + 0.2551984011425057;
  q = q * t - 0.8097845650405178;
  q = q * t + 1.4011721459632658;
  q = q * t - 1.3796655945494736;
  q = q * t + 0.7709786214219891;
  q = q * t - 0.36513932357152473;
  q = q * t + 0.19563883565240558;
  q = q * t + 0.15168425542159714;
  q = q * t + 0.25058814653817546;
  q = q * t + 0.2817180916310167;
  q = q * t + 0.2821171043405233;
  q = q * t - 5.899704614671669e-07;
  const double y = q * vec::exp64(-a * a);
  return static_cast<float>(x < 0.0f ? 2.0 - y : y);
}

inline double verf(double x) { return std::erf(x); }
inline double verfc(double x) { return std::erfc(x); }

}  // namespace vt::cpu::VT_ISA
