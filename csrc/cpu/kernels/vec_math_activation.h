// Activation functions and their derivatives with respect to the input.
#pragma once

#include "cpu/kernels/vec_math_erf.h"
#include "cpu/kernels/vec_math_exp.h"

namespace vt::cpu::VT_ISA {

namespace vec {

/// The normal distribution function, to 3e-8 absolute and without cancellation for x < 0: below
/// the mean it is two to the power of a polynomial in |x|, which goes to minus infinity.
[[gnu::always_inline]] inline float normal_cdf(float x) {
  const float a = std::fabs(x);
  float q = -2.8279276e-08f;
  q = q * a + 8.4603516e-07f;
  q = q * a - 1.08360255e-05f;
  q = q * a + 7.56589e-05f;
  q = q * a - 0.00027653982f;
  q = q * a - 7.746088e-06f;
  q = q * a + 0.006958239f;
  q = q * a - 0.05245018f;
  q = q * a - 0.4592176f;
  q = q * a - 1.1511046f;
  q = q * a - 1.0f;
  const float lower = a > 13.0f ? 0.0f : exp2_in_range(q < -126.0f ? -126.0f : q);
  return x < 0.0f ? lower : 1.0f - lower;
}
inline double normal_cdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752); }

[[gnu::always_inline]] inline float normal_pdf(float x) {
  const float t = -0.5f * x * x;
  return t < -87.0f ? 0.0f : 0.398942280f * exp_in_range(t);
}
inline double normal_pdf(double x) { return 0.39894228040143268 * std::exp(-0.5 * x * x); }

/// tanh(log(1 + e^x)) = n / d; by w = e^-|x| so that nothing overflows.
template <class T>
struct TanhSoftplus {
  T n, d;
};
template <class T>
[[gnu::always_inline]] inline TanhSoftplus<T> tanh_softplus(T x) {
  const T w = vexp(-std::fabs(x));
  const T n = x < 0 ? w * (w + 2) : 1 + 2 * w;
  const T rest = x < 0 ? T(2) : 2 * w * w;
  return {n, n + rest};
}

/// log(1 + e) for e in [0, 1].
[[gnu::always_inline]] inline float log1p_unit(float e) {
  const float u = 1.0f + e;
  return log_normal(u) + (e - (u - 1.0f)) / u;
}
inline double log1p_unit(double e) { return std::log1p(e); }

}  // namespace vec

/// T is float or double below.
template <class T>
[[gnu::always_inline]] inline T vsigmoid(T x) {
  const T e = vexp(-std::fabs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}
namespace vec {

/// sigmoid(x) (1 - sigmoid(x)), without the cancellation.
template <class T>
[[gnu::always_inline]] inline T sigmoid_slope(T x) {
  const T e = vexp(-std::fabs(x));
  const T d = 1 + e;
  return e / (d * d);
}

}  // namespace vec

template <class T>
[[gnu::always_inline]] inline T vsilu(T x) {
  return x * vsigmoid(x);
}
template <class T>
[[gnu::always_inline]] inline T vsilu_grad(T x) {
  return vsigmoid(x) + x * vec::sigmoid_slope(x);
}

/// log(1 + e^(beta x)) / beta; x itself where beta x > threshold.
template <class T>
[[gnu::always_inline]] inline T vsoftplus(T x, T beta = 1, T threshold = 20) {
  const T z = x * beta;
  const T y = ((z > 0 ? z : T(0)) + vec::log1p_unit(vexp(-std::fabs(z)))) / beta;
  return z > threshold ? x : (z == z ? y : z);
}
/// x tanh(softplus(x))
template <class T>
[[gnu::always_inline]] inline T vmish(T x) {
  const vec::TanhSoftplus<T> t = vec::tanh_softplus(x);
  return x * (t.n / t.d);
}
/// x times the normal distribution function: GELU by the error function.
template <class T>
[[gnu::always_inline]] inline T vgelu(T x) {
  return x * vec::normal_cdf(x);
}
template <class T>
[[gnu::always_inline]] inline T vgelu_grad(T x) {
  return vec::normal_cdf(x) + x * vec::normal_pdf(x);
}

/// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), written as x sigmoid(2 u).
template <class T>
[[gnu::always_inline]] inline T vgelu_tanh(T x) {
  const T u = T(1.5957691216057308) * x * (1 + T(0.044715) * x * x);
  return x * vsigmoid(u);
}
template <class T>
[[gnu::always_inline]] inline T vgelu_tanh_grad(T x) {
  x = x > 20 ? T(20) : x;  // flat from there on, and x^3 does not overflow
  x = x < -20 ? T(-20) : x;
  const T u = T(1.5957691216057308) * x * (1 + T(0.044715) * x * x);
  const T slope = T(1.5957691216057308) * (1 + T(3 * 0.044715) * x * x);
  return vsigmoid(u) + x * slope * vec::sigmoid_slope(u);
}

}  // namespace vt::cpu::VT_ISA
