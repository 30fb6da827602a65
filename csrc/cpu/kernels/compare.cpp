// Comparisons, logic and bits of two tensors.
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class F>
void map_test(TensorIterator& it, const F& f) {
  visit_all(it.common_dtype(),
            [&]<class T>() { map_kernel(it, [f](T a, T b) -> bool { return f(a, b); }); });
}
template <class F>
void map_bits(TensorIterator& it, const F& f) {
  if (it.common_dtype() == DType::Bool) {
    map_kernel(it, [f](bool a, bool b) -> bool { return f(a, b); });
    return;
  }
  visit_integral(it.common_dtype(), [&]<class T>() {
    map_kernel(it, [f](T a, T b) -> T { return static_cast<T>(f(a, b)); });
  });
}
template <class F>
void map_integers(TensorIterator& it, const F& f) {
  visit_integral(it.common_dtype(), [&]<class T>() {
    map_kernel(it, [f](T a, T b) -> T { return static_cast<T>(f(a, b)); });
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.eq = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a == b; }); };
  t.ne = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a != b; }); };
  t.lt = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a < b; }); };
  t.le = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a <= b; }); };
  t.gt = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a > b; }); };
  t.ge = [](TensorIterator& it) { map_test(it, [](auto a, auto b) { return a >= b; }); };
  t.logical_and = [](TensorIterator& it) {
    map_test(it, [](auto a, auto b) { return a != 0 && b != 0; });
  };
  t.logical_or = [](TensorIterator& it) {
    map_test(it, [](auto a, auto b) { return a != 0 || b != 0; });
  };
  t.logical_xor = [](TensorIterator& it) {
    map_test(it, [](auto a, auto b) { return (a != 0) != (b != 0); });
  };
  t.bitwise_and = [](TensorIterator& it) { map_bits(it, [](auto a, auto b) { return a & b; }); };
  t.bitwise_or = [](TensorIterator& it) { map_bits(it, [](auto a, auto b) { return a | b; }); };
  t.bitwise_xor = [](TensorIterator& it) { map_bits(it, [](auto a, auto b) { return a ^ b; }); };
  // Shifts past the width give 0 (or the sign) instead of C++'s undefined behaviour.
  t.bitwise_left_shift = [](TensorIterator& it) {
    map_integers(it, [](auto a, auto b) {
      constexpr int width = static_cast<int>(sizeof(a) * 8);
      return b < 0 || b >= width ? decltype(a)(0)
                                 : static_cast<decltype(a)>(static_cast<uint64_t>(a) << b);
    });
  };
  t.bitwise_right_shift = [](TensorIterator& it) {
    map_integers(it, [](auto a, auto b) {
      constexpr int width = static_cast<int>(sizeof(a) * 8);
      return b < 0 || b >= width ? static_cast<decltype(a)>(a < 0 ? -1 : 0)
                                 : static_cast<decltype(a)>(a >> b);
    });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
