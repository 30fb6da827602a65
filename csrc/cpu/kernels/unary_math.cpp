// Unary functions on floating types.
#include <cmath>
#include <limits>

#include "cpu/kernels/loops.h"
#include "cpu/kernels/vec_math.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class F>
void map_float(TensorIterator& it, const F& f, int64_t grain = 8192) {
  if (it.common_dtype() == DType::Float64)
    map_kernel(it, [f](double x) -> double { return f(x); }, grain);
  else
    map_kernel(it, [f](float x) -> float { return f(x); }, grain);
}

/// Functions that vectorise over arrays only (their range reduction branches): `array` is vsin_n,
/// ….
template <class F>
void map_trig(TensorIterator& it, const F& array) {
  if (it.common_dtype() == DType::Float64)
    map_blocks<double, 1>(it, array);
  else
    map_blocks<float, 1>(it, array);
}

/// A rational start (Winitzki's approximation of erf, inverted), then three Newton steps.
double erfinv(double x) {
  if (!(std::fabs(x) < 1)) {
    return std::fabs(x) == 1 ? std::copysign(std::numeric_limits<double>::infinity(), x)
                             : std::numeric_limits<double>::quiet_NaN();
  }
  constexpr double a = 0.147, pi = 3.141592653589793;
  const double log = std::log1p(-x * x), half = 2 / (pi * a) + log / 2;
  double y = std::copysign(std::sqrt(std::sqrt(half * half - log / a) - half), x);
  for (int step = 0; step < 3; ++step) {
    // By erfc in the tails, where erf has no digits left.
    const double tail = (1 - std::fabs(x)) - std::erfc(std::fabs(y));
    const double error = std::fabs(x) < 0.5 ? std::erf(y) - x : x < 0 ? -tail : tail;
    const double slope = 1.1283791670955126 * std::exp(-y * y);
    const double newton = error / slope;
    y -= newton / (1 + y * newton);
  }
  return y;
}

const RegisterCpu registered([](KernelTable& t) {
  t.exp = [](TensorIterator& it) { map_float(it, [](auto x) { return vexp(x); }); };
  t.exp2 = [](TensorIterator& it) { map_float(it, [](auto x) { return vexp2(x); }); };
  t.expm1 = [](TensorIterator& it) { map_float(it, [](auto x) { return vexpm1(x); }); };
  t.log = [](TensorIterator& it) { map_float(it, [](auto x) { return vlog(x); }); };
  t.log2 = [](TensorIterator& it) { map_float(it, [](auto x) { return vlog2(x); }); };
  t.log10 = [](TensorIterator& it) { map_float(it, [](auto x) { return vlog10(x); }); };
  t.log1p = [](TensorIterator& it) { map_float(it, [](auto x) { return vlog1p(x); }); };
  t.sqrt = [](TensorIterator& it) { map_float(it, [](auto x) { return std::sqrt(x); }); };
  t.rsqrt = [](TensorIterator& it) {
    map_float(it, [](auto x) { return decltype(x)(1) / std::sqrt(x); });
  };
  t.reciprocal = [](TensorIterator& it) {
    map_float(it, [](auto x) { return decltype(x)(1) / x; });
  };
  t.sin = [](TensorIterator& it) {
    map_trig(it, [](auto* out, const auto* in, int64_t n) { vsin_n(out, in, n); });
  };
  t.cos = [](TensorIterator& it) {
    map_trig(it, [](auto* out, const auto* in, int64_t n) { vcos_n(out, in, n); });
  };
  t.tan = [](TensorIterator& it) {
    map_trig(it, [](auto* out, const auto* in, int64_t n) { vtan_n(out, in, n); });
  };
  t.asin = [](TensorIterator& it) { map_float(it, [](auto x) { return vasin(x); }); };
  t.acos = [](TensorIterator& it) { map_float(it, [](auto x) { return vacos(x); }); };
  t.atan = [](TensorIterator& it) { map_float(it, [](auto x) { return vatan(x); }); };
  t.sinh = [](TensorIterator& it) { map_float(it, [](auto x) { return vsinh(x); }); };
  t.cosh = [](TensorIterator& it) { map_float(it, [](auto x) { return vcosh(x); }); };
  t.tanh = [](TensorIterator& it) { map_float(it, [](auto x) { return vtanh(x); }); };
  t.asinh = [](TensorIterator& it) { map_float(it, [](auto x) { return vasinh(x); }); };
  t.acosh = [](TensorIterator& it) { map_float(it, [](auto x) { return vacosh(x); }); };
  t.atanh = [](TensorIterator& it) { map_float(it, [](auto x) { return vatanh(x); }); };
  t.erf = [](TensorIterator& it) { map_float(it, [](auto x) { return verf(x); }); };
  t.erfc = [](TensorIterator& it) { map_float(it, [](auto x) { return verfc(x); }); };
  t.erfinv = [](TensorIterator& it) {
    map_float(it, [](auto x) { return static_cast<decltype(x)>(erfinv(x)); });
  };
  t.sigmoid = [](TensorIterator& it) {
    map_float(it, [](auto x) { return decltype(x)(1) / (decltype(x)(1) + vexp(-x)); });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
