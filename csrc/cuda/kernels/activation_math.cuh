// Activation functions and their derivatives with respect to the input, in the forms the CPU
// backend uses: no overflow, no cancellation in the tails. T is float or double.
//
// Sums and products are written as the instructions they are. A compiler may then not contract them
// as it sees fit, so that kernels made at run time (kernels/chain_prelude.cuh), which get the text
// of this file, have the same bits.
#pragma once

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif

namespace vt::cuda {

__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }
/// a * b + c, rounded once.
__device__ inline float times_plus(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double times_plus(double a, double b, double c) { return __fma_rn(a, b, c); }

/// a / b within 2 ulp, for b in [2^-126, 2^126].
__device__ inline float divide_near(float a, float b) { return __fdividef(a, b); }
__device__ inline double divide_near(double a, double b) { return __ddiv_rn(a, b); }

template <class T>
__device__ inline T sigmoid(T x) {
  const T e = exp(-fabs(x));
  return divide_near(x < T(0) ? e : T(1), plus(T(1), e));
}
/// sigmoid(x) (1 - sigmoid(x)), without the cancellation.
template <class T>
__device__ inline T sigmoid_slope(T x) {
  const T e = exp(-fabs(x)), d = plus(T(1), e);
  return divide_near(e, times(d, d));
}

/// The normal distribution function: below the mean it is two to the power of a polynomial in |x|,
/// to 3e-8 absolute and with relative accuracy in the tail.
__device__ inline float normal_cdf(float x) {
  const float a = fabsf(x);
  float q = -2.8279276e-08f;
  q = times_plus(q, a, 8.4603516e-07f);
  q = times_plus(q, a, -1.08360255e-05f);
  q = times_plus(q, a, 7.56589e-05f);
  q = times_plus(q, a, -0.00027653982f);
  q = times_plus(q, a, -7.746088e-06f);
  q = times_plus(q, a, 0.006958239f);
  q = times_plus(q, a, -0.05245018f);
  q = times_plus(q, a, -0.4592176f);
  q = times_plus(q, a, -1.1511046f);
  q = times_plus(q, a, -1.0f);
  const float lower = a > 13.0f ? 0.0f : exp2f(q);
  return x < 0.0f ? lower : plus(1.0f, -lower);
}
__device__ inline double normal_cdf(double x) {
  return times(0.5, erfc(times(x, -0.70710678118654752)));
}

template <class T>
__device__ inline T normal_pdf(T x) {
  return times(T(0.39894228040143268), exp(times(times(T(-0.5), x), x)));
}

/// x times the normal distribution function: GELU by the error function.
template <class T>
__device__ inline T gelu(T x) {
  return times(x, normal_cdf(x));
}
template <class T>
__device__ inline T gelu_slope(T x) {
  return times_plus(x, normal_pdf(x), normal_cdf(x));
}

/// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), written as x sigmoid(2 u).
template <class T>
__device__ inline T gelu_tanh(T x) {
  const T u =
      times(times(T(1.5957691216057308), x), times_plus(times(T(0.044715), x), x, T(1)));
  return times(x, sigmoid(u));
}
template <class T>
__device__ inline T gelu_tanh_slope(T x) {
  x = x > T(20) ? T(20) : x;  // flat from there on, and x^3 does not overflow
  x = x < T(-20) ? T(-20) : x;
  const T u =
      times(times(T(1.5957691216057308), x), times_plus(times(T(0.044715), x), x, T(1)));
  const T slope =
      times(T(1.5957691216057308), times_plus(times(T(3 * 0.044715), x), x, T(1)));
  return times_plus(times(x, slope), sigmoid_slope(u), sigmoid(u));
}

template <class T>
__device__ inline T silu(T x) {
  return times(x, sigmoid(x));
}
template <class T>
__device__ inline T silu_slope(T x) {
  return times_plus(x, sigmoid_slope(x), sigmoid(x));
}

/// x tanh(softplus(x)); tanh(log(1 + e^x)) = n / d by w = e^-|x|, so that nothing overflows.
template <class T>
__device__ inline T mish(T x) {
  const T w = exp(-fabs(x));
  const T n = x < T(0) ? times(w, plus(w, T(2))) : times_plus(T(2), w, T(1));
  const T d = plus(n, x < T(0) ? T(2) : times(times(T(2), w), w));
  return times(x, divide_near(n, d));
}

/// log(1 + e^(beta x)) / beta; x itself where beta x > threshold.
template <class T>
__device__ inline T softplus(T x, T beta, T threshold) {
  const T z = times(x, beta);
  if (z > threshold || z != z) return x;
  return plus(z > T(0) ? z : T(0), log1p(exp(-fabs(z)))) / beta;
}

}  // namespace vt::cuda
