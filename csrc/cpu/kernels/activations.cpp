// Activations and their gradients.
#include <cmath>

#include "cpu/kernels/loops.h"
#include "cpu/kernels/vec_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kGrain = 8192;

template <class F>
void map1(TensorIterator& it, const F& f) {
  visit_float(it.common_dtype(),
              [&]<class T>() { map_kernel(it, [f](T x) -> T { return f(x); }, kGrain); });
}
template <class F>
void map2(TensorIterator& it, const F& f) {
  visit_float(it.common_dtype(),
              [&]<class T>() { map_kernel(it, [f](T a, T b) -> T { return f(a, b); }, kGrain); });
}

bool is_tanh_form(std::string_view approximate) {
  check(approximate == "none" || approximate == "tanh",
        "approximate argument must be either none or tanh, got '", approximate, "'");
  return approximate == "tanh";
}

const RegisterCpu registered([](KernelTable& t) {
  t.relu = [](TensorIterator& it) {
    visit_numeric(it.common_dtype(), [&]<class T>() {
      map_kernel(it, [](T x) -> T { return x != x ? x : x > T(0) ? x : T(0); });
    });
  };
  t.threshold = [](TensorIterator& it, const Scalar& threshold, const Scalar& value) {
    visit_numeric(it.common_dtype(), [&]<class T>() {
      const T limit = threshold.to<T>(), other = value.to<T>();
      map_kernel(it, [=](T x) -> T { return x <= limit ? other : x; });
    });
  };
  t.threshold_backward = [](TensorIterator& it, const Scalar& threshold) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T limit = threshold.to<T>();
      map_kernel(it, [=](T g, T x) -> T { return x <= limit ? T(0) : g; });
    });
  };
  t.tanh_backward = [](TensorIterator& it) {
    map2(it, [](auto g, auto y) { return g * (1 - y * y); });
  };
  t.sigmoid_backward = [](TensorIterator& it) {
    map2(it, [](auto g, auto y) { return g * (1 - y) * y; });
  };
  t.gelu = [](TensorIterator& it, std::string_view approximate) {
    if (is_tanh_form(approximate))
      map1(it, [](auto x) { return vgelu_tanh(x); });
    else
      map1(it, [](auto x) { return vgelu(x); });
  };
  t.gelu_backward = [](TensorIterator& it, std::string_view approximate) {
    if (is_tanh_form(approximate))
      map2(it, [](auto g, auto x) { return g * vgelu_tanh_grad(x); });
    else
      map2(it, [](auto g, auto x) { return g * vgelu_grad(x); });
  };
  t.silu = [](TensorIterator& it) { map1(it, [](auto x) { return vsilu(x); }); };
  t.silu_backward = [](TensorIterator& it) {
    map2(it, [](auto g, auto x) { return g * vsilu_grad(x); });
  };
  t.mish = [](TensorIterator& it) { map1(it, [](auto x) { return vmish(x); }); };
  t.softplus = [](TensorIterator& it, const Scalar& beta, const Scalar& threshold) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T b = beta.to<T>(), limit = threshold.to<T>();
      map_kernel(it, [=](T x) -> T { return vsoftplus(x, b, limit); }, kGrain);
    });
  };
  t.leaky_relu = [](TensorIterator& it, const Scalar& slope) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T s = slope.to<T>();
      map_kernel(it, [=](T x) -> T { return x > T(0) ? x : x * s; });
    });
  };
  t.leaky_relu_backward = [](TensorIterator& it, const Scalar& slope) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T s = slope.to<T>();
      map_kernel(it, [=](T g, T x) -> T { return x > T(0) ? g : g * s; });
    });
  };
  t.elu = [](TensorIterator& it, const Scalar& alpha, const Scalar& scale,
             const Scalar& input_scale) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T positive = scale.to<T>(), negative = alpha.to<T>() * scale.to<T>(),
              inner = input_scale.to<T>();
      map_kernel(
          it, [=](T x) -> T { return x > T(0) ? x * positive : vexpm1(x * inner) * negative; },
          kGrain);
    });
  };
  t.hardtanh = [](TensorIterator& it, const Scalar& min_val, const Scalar& max_val) {
    visit_numeric(it.common_dtype(), [&]<class T>() {
      const T low = min_val.to<T>(), high = max_val.to<T>();
      map_kernel(it, [=](T x) -> T { return x < low ? low : x > high ? high : x; });
    });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
