// Sums, maxima and exponentials of a dense row, in vector registers. The order of summation
// depends on the row's length only.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "core/dtype.h"

namespace vt::cpu::VT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
inline void store(T* p, const Vector<T>& v) {
  std::memcpy(p, &v, sizeof(v));
}

/// Sum of f(i) over [0, n): `vector(i)` gives lanes i…, `scalar(i)` one element of the tail.
template <class T, class V, class S>
inline T sum_over(int64_t n, const V& vector, const S& scalar) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  Vector<T> a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a += vector(i);
    b += vector(i + lanes);
    c += vector(i + 2 * lanes);
    d += vector(i + 3 * lanes);
  }
  for (; i + lanes <= n; i += lanes) a += vector(i);
  a = (a + b) + (c + d);
  T part[lanes];
  std::memcpy(part, &a, sizeof(a));
  for (int64_t step = lanes / 2; step > 0; step /= 2) {
    for (int64_t l = 0; l < step; ++l) part[l] += part[l + step];
  }
  T tail = 0;
  for (; i < n; ++i) tail += scalar(i);
  return part[0] + tail;
}

template <class T>
inline T row_sum(const T* x, int64_t n) {
  return sum_over<T>(n, [&](int64_t i) { return load(x + i); }, [&](int64_t i) { return x[i]; });
}
template <class T>
inline T row_dot(const T* x, const T* y, int64_t n) {
  return sum_over<T>(
      n, [&](int64_t i) { return load(x + i) * load(y + i); },
      [&](int64_t i) { return x[i] * y[i]; });
}
template <class T>
inline T row_square_deviation(const T* x, T mean, int64_t n) {
  return sum_over<T>(
      n,
      [&](int64_t i) {
        const Vector<T> d = load(x + i) - mean;
        return d * d;
      },
      [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}

/// The largest element; NaN if one is NaN; -inf for an empty row.
template <class T>
inline T row_max(const T* x, int64_t n) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  T best = -std::numeric_limits<T>::infinity();
  int64_t i = 0;
  bool nan = false;
  if (n >= lanes) {
    Vector<T> m = load(x), odd = m - m;  // odd: NaN where an element was NaN or infinite
    const auto take = [&](int64_t at) {
      const Vector<T> v = load(x + at);
      m = v > m ? v : m;
      odd += v - v;
    };
    for (i = lanes; i + lanes <= n; i += lanes) take(i);
    if (i < n) take(n - lanes);  // some elements twice
    i = n;
    for (int64_t l = 0; l < lanes; ++l) {
      if (m[l] > best) best = m[l];
      nan |= odd[l] != odd[l];
    }
    if (nan) {
      nan = false;
      for (int64_t k = 0; k < n; ++k) nan |= x[k] != x[k];
      best = -std::numeric_limits<T>::infinity();
      for (int64_t k = 0; k < n; ++k) best = x[k] > best ? x[k] : best;
    }
  }
  for (; i < n; ++i) {
    if (x[i] > best) best = x[i];
    nan |= x[i] != x[i];
  }
  return nan ? std::numeric_limits<T>::quiet_NaN() : best;
}

/// e^x for x ≤ 88, within 2 ulp, 0 below -87.3; vectorises as plain arithmetic.
/// Range reduction by ln 2 in two parts and a degree-6 polynomial (Cephes' coefficients' form).
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t bits = (__builtin_bit_cast(uint32_t, shifted) - 0x4b400000u + 127u) << 23;
  const float value = p * __builtin_bit_cast(float, bits);
  return x < -87.3f ? 0.0f : value;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

/// out[i] = e^(x[i]·scale − shift); returns their sum. `out` may be `x`.
template <class T>
inline T row_exp(T* out, const T* x, T scale, T shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(x[i] * scale - shift);
  return row_sum(out, n);
}
/// Σ e^(x[i] − shift), through a block that stays in L1.
template <class T>
inline T row_exp_sum(const T* x, T shift, int64_t n) {
  constexpr int64_t kBlockSize = 512;
  T block[kBlockSize];
  T total = 0;
  for (int64_t i = 0; i < n; i += kBlockSize) {
    const int64_t m = std::min(kBlockSize, n - i);
    total += row_exp(block, x + i, T(1), shift, m);
  }
  return total;
}

}  // namespace vt::cpu::VT_ISA
