// Unary functions on floating types.
#include <cmath>

#include "cpu/kernels/loops.h"
#include "cpu/kernels/vec_math.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class F>
void map_float(TensorIterator& it, const F& f, int64_t grain = 8192) {
  if (it.common_dtype() == DType::Float64) map_kernel(it, [f](double x) -> double { return f(x); }, grain);
  else map_kernel(it, [f](float x) -> float { return f(x); }, grain);
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
  t.rsqrt = [](TensorIterator& it) { map_float(it, [](auto x) { return decltype(x)(1) / std::sqrt(x); }); };
  t.reciprocal = [](TensorIterator& it) { map_float(it, [](auto x) { return decltype(x)(1) / x; }); };
  t.sin = [](TensorIterator& it) { map_float(it, [](auto x) { return vsin(x); }); };
  t.cos = [](TensorIterator& it) { map_float(it, [](auto x) { return vcos(x); }); };
  t.tan = [](TensorIterator& it) { map_float(it, [](auto x) { return vtan(x); }); };
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
  t.sigmoid = [](TensorIterator& it) { map_float(it, [](auto x) { return decltype(x)(1) / (decltype(x)(1) + vexp(-x)); }); };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
