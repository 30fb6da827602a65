// Unary functions on every dtype: signs, rounding, tests, bits.
#include <cmath>
#include <limits>

#include "core/largest_finite.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class F>
void map_numeric(TensorIterator& it, const F& f) {
  visit_all(it.common_dtype(),
            [&]<class T>() { map_kernel(it, [f](T x) -> T { return static_cast<T>(f(x)); }); });
}
template <class F>
void map_test(TensorIterator& it, const F& f) {
  visit_all(it.common_dtype(),
            [&]<class T>() { map_kernel(it, [f](T x) -> bool { return f(x); }); });
}
/// A test that every integer answers alike.
template <class F>
void map_float_test(TensorIterator& it, bool of_integers, const F& f) {
  if (is_floating(it.common_dtype()))
    visit_float(it.common_dtype(),
                [&]<class T>() { map_kernel(it, [f](T x) -> bool { return f(x); }); });
  else
    map_kernel(it, [of_integers](int64_t) -> bool { return of_integers; });
}
/// Integers are already round.
template <class F>
void map_rounding(TensorIterator& it, const F& f) {
  if (is_floating(it.common_dtype()))
    visit_float(it.common_dtype(),
                [&]<class T>() { map_kernel(it, [f](T x) -> T { return f(x); }); });
  else
    map_kernel(it, [](int64_t x) -> int64_t { return x; });
}

template <class T>
constexpr T infinity(T) {
  return std::numeric_limits<T>::infinity();
}

template <class T>
T sign(T x) {
  return static_cast<T>((x > T(0)) - (x < T(0)));  // 0 of nan
}

void round_to(TensorIterator& it, int64_t decimals) {
  if (decimals == 0) {
    map_rounding(it, [](auto x) { return std::nearbyint(x); });
    return;
  }
  const double scale = std::pow(10.0, static_cast<double>(decimals < 0 ? -decimals : decimals));
  map_rounding(it, [=](auto x) {
    const auto s = static_cast<decltype(x)>(scale);
    return decimals > 0 ? std::nearbyint(x * s) / s : std::nearbyint(x / s) * s;
  });
}

void nan_to_num(TensorIterator& it, std::optional<double> nan, std::optional<double> posinf,
                std::optional<double> neginf) {
  const double limit = largest_finite(it.common_dtype());
  const double a = nan.value_or(0.0), b = posinf.value_or(limit), c = neginf.value_or(-limit);
  map_rounding(it, [=](auto x) {
    using T = decltype(x);
    return x != x              ? static_cast<T>(a)
           : x == infinity(x)  ? static_cast<T>(b)
           : x == -infinity(x) ? static_cast<T>(c)
                               : x;
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.neg = [](TensorIterator& it) { map_numeric(it, [](auto x) { return -x; }); };
  t.abs = [](TensorIterator& it) {
    map_numeric(it, [](auto x) {
      if constexpr (std::is_floating_point_v<decltype(x)>)
        return std::fabs(x);
      else
        return x < decltype(x)(0) ? -x : x;
    });
  };
  t.sign = [](TensorIterator& it) { map_numeric(it, [](auto x) { return sign(x); }); };
  t.sgn = t.sign;
  t.square = [](TensorIterator& it) { map_numeric(it, [](auto x) { return x * x; }); };
  t.floor = [](TensorIterator& it) { map_rounding(it, [](auto x) { return std::floor(x); }); };
  t.ceil = [](TensorIterator& it) { map_rounding(it, [](auto x) { return std::ceil(x); }); };
  t.trunc = [](TensorIterator& it) { map_rounding(it, [](auto x) { return std::trunc(x); }); };
  t.frac = [](TensorIterator& it) {
    visit_float(it.common_dtype(),
                [&]<class T>() { map_kernel(it, [](T x) -> T { return x - std::trunc(x); }); });
  };
  t.round = round_to;
  t.nan_to_num = nan_to_num;
  t.bitwise_not = [](TensorIterator& it) {
    if (it.common_dtype() == DType::Bool) {
      map_kernel(it, [](bool x) -> bool { return !x; });
      return;
    }
    visit_integral(it.common_dtype(),
                   [&]<class T>() { map_kernel(it, [](T x) -> T { return static_cast<T>(~x); }); });
  };
  t.logical_not = [](TensorIterator& it) { map_test(it, [](auto x) { return !x; }); };
  t.isnan = [](TensorIterator& it) { map_float_test(it, false, [](auto x) { return x != x; }); };
  t.isinf = [](TensorIterator& it) {
    map_float_test(it, false, [](auto x) { return std::fabs(x) == infinity(x); });
  };
  t.isfinite = [](TensorIterator& it) {
    map_float_test(it, true, [](auto x) { return std::fabs(x) < infinity(x); });
  };
  t.isposinf = [](TensorIterator& it) {
    map_float_test(it, false, [](auto x) { return x == infinity(x); });
  };
  t.isneginf = [](TensorIterator& it) {
    map_float_test(it, false, [](auto x) { return x == -infinity(x); });
  };
  t.signbit = [](TensorIterator& it) {
    map_test(it, [](auto x) {
      if constexpr (std::is_floating_point_v<decltype(x)>)
        return std::signbit(x);
      else
        return x < decltype(x)(0);
    });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
