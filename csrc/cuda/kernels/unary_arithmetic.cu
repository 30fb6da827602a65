// Unary functions on every dtype: signs, rounding, tests, bits.
#include <cmath>
#include <optional>

#include "core/largest_finite.h"
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Negate {
  template <class T>
  __device__ T operator()(T x) const {
    if constexpr (std::is_same_v<T, bool>)
      return x;
    else
      return -x;
  }
};
struct Abs {
  template <class T>
  __device__ T operator()(T x) const {
    if constexpr (std::is_same_v<T, bool>)
      return x;
    else if constexpr (std::is_integral_v<T>)
      return x < 0 ? -x : x;
    else
      return fabs(x);
  }
};
struct Sign {
  template <class T>
  __device__ T operator()(T x) const {
    return static_cast<T>((x > T(0)) - (x < T(0)));  // 0 of nan
  }
};
struct Square {
  template <class T>
  __device__ T operator()(T x) const {
    return static_cast<T>(x * x);
  }
};
struct Floor {
  template <class T>
  __device__ T operator()(T x) const {
    return floor(x);
  }
};
struct Ceil {
  template <class T>
  __device__ T operator()(T x) const {
    return ceil(x);
  }
};
struct Trunc {
  template <class T>
  __device__ T operator()(T x) const {
    return trunc(x);
  }
};
struct Frac {
  template <class T>
  __device__ T operator()(T x) const {
    return x - trunc(x);
  }
};
struct Round {
  template <class T>
  __device__ T operator()(T x) const {
    return rint(x);
  }
};
/// To digits after the point, or before it.
struct RoundDecimals {
  double scale;
  bool after;
  template <class T>
  __device__ T operator()(T x) const {
    const T s = static_cast<T>(scale);
    return after ? rint(x * s) / s : rint(x / s) * s;
  }
};
struct NanToNum {
  double nan, positive, negative;
  template <class T>
  __device__ T operator()(T x) const {
    if (x != x) return static_cast<T>(nan);
    if (!isinf(x)) return x;
    return static_cast<T>(x > T(0) ? positive : negative);
  }
};
struct BitNot {
  template <class T>
  __device__ T operator()(T x) const {
    if constexpr (std::is_same_v<T, bool>)
      return !x;
    else
      return ~x;
  }
};
struct LogicalNot {
  template <class T>
  __device__ bool operator()(T x) const {
    return x == T(0);
  }
};
struct SignBit {
  template <class T>
  __device__ bool operator()(T x) const {
    if constexpr (std::is_floating_point_v<T>)
      return signbit(x);
    else
      return x < T(0);
  }
};

enum FloatClass : uint8_t { kNan = 1, kPositiveInf = 2, kNegativeInf = 4, kFinite = 8 };
/// Whether x is of one of the `accepted` classes. Integers are finite.
struct IsClass {
  uint8_t accepted;
  template <class T>
  __device__ bool operator()(T x) const {
    int found = kFinite;
    if constexpr (std::is_floating_point_v<T>)
      found = x != x ? kNan : !isinf(x) ? kFinite : x > T(0) ? kPositiveInf : kNegativeInf;
    return (accepted & found) != 0;
  }
};

template <class F>
void map_all(TensorIterator& it, const F& f) {
  visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, f); });
}
template <class F>
void map_test(TensorIterator& it, const F& f) {
  visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, bool, 1>(it, f); });
}
template <class F>
void map_float(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, f); });
}
/// Integers are already round, and never NaN.
template <class F>
void map_rounding(TensorIterator& it, const F& f) {
  if (is_floating(it.common_dtype()))
    map_float(it, f);
  else
    map_all(it, Identity{});
}

void round_decimals(TensorIterator& it, int64_t decimals) {
  if (decimals == 0)
    map_rounding(it, Round{});
  else
    map_rounding(
        it, RoundDecimals{std::pow(10.0, std::fabs(static_cast<double>(decimals))), decimals > 0});
}

void nan_to_num(TensorIterator& it, std::optional<double> nan, std::optional<double> posinf,
                std::optional<double> neginf) {
  const double limit = largest_finite(it.common_dtype());
  map_rounding(it, NanToNum{nan.value_or(0.0), posinf.value_or(limit), neginf.value_or(-limit)});
}

const RegisterCuda registered([](KernelTable& t) {
  t.neg = [](TensorIterator& it) { map_all(it, Negate{}); };
  t.abs = [](TensorIterator& it) { map_all(it, Abs{}); };
  t.sign = [](TensorIterator& it) { map_all(it, Sign{}); };
  t.sgn = t.sign;
  t.square = [](TensorIterator& it) { map_all(it, Square{}); };
  t.floor = [](TensorIterator& it) { map_rounding(it, Floor{}); };
  t.ceil = [](TensorIterator& it) { map_rounding(it, Ceil{}); };
  t.trunc = [](TensorIterator& it) { map_rounding(it, Trunc{}); };
  t.frac = [](TensorIterator& it) { map_float(it, Frac{}); };
  t.round = round_decimals;
  t.nan_to_num = nan_to_num;
  t.bitwise_not = [](TensorIterator& it) {
    if (it.common_dtype() == DType::Bool)
      map_kernel<bool, bool, 1>(it, BitNot{});
    else
      visit_compute_integral(it.common_dtype(),
                             [&]<class T>() { map_kernel<T, T, 1>(it, BitNot{}); });
  };
  t.logical_not = [](TensorIterator& it) { map_test(it, LogicalNot{}); };
  t.isnan = [](TensorIterator& it) { map_test(it, IsClass{kNan}); };
  t.isinf = [](TensorIterator& it) { map_test(it, IsClass{kPositiveInf | kNegativeInf}); };
  t.isfinite = [](TensorIterator& it) { map_test(it, IsClass{kFinite}); };
  t.isposinf = [](TensorIterator& it) { map_test(it, IsClass{kPositiveInf}); };
  t.isneginf = [](TensorIterator& it) { map_test(it, IsClass{kNegativeInf}); };
  t.signbit = [](TensorIterator& it) { map_test(it, SignBit{}); };
});

}  // namespace
}  // namespace vt::cuda
