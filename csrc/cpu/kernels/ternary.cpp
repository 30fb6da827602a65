// Three operands: where, clamp, lerp, addcmul, addcdiv, masked_fill.
#include "cpu/kernels/loops.h"
#include "cpu/kernels/rows.h"

namespace vt::cpu::VT_ISA {
namespace {

void where(const Tensor& out, const Tensor& condition, const Tensor& self, const Tensor& other) {
  Tensor target = out;
  TensorIterator it;
  Tensor* outs[] = {&target};
  const Tensor* ins[] = {&condition, &self, &other};
  it.build(outs, ins, {.promote = Promote::None, .output_dtype = out.dtype(), .op = "where"});
  where_rows(it);
}

/// where(mask, value, self) into self.
void masked_fill(const Tensor& self, const Tensor& mask, const Tensor& value) {
  check(value.dim() == 0,
        "masked_fill_ only supports a 0-dimensional value tensor, but got tensor with ",
        value.dim(), " dimension(s).");
  check(mask.dtype() == DType::Bool,
        "masked_fill_ only supports boolean masks, but got mask with dtype ", mask.dtype());
  const Tensor fill = empty({}, self.dtype());
  kernels_for(DeviceType::CPU).fill_(fill, value);
  where(self, mask, fill, self);
}

const RegisterCpu registered([](KernelTable& t) {
  t._where = where;
  t.masked_fill_ = masked_fill;
  t._clamp = [](TensorIterator& it) {
    visit_all(it.common_dtype(), [&]<class T>() {
      map_kernel(it, [](T x, T low, T high) -> T {
        if constexpr (std::is_floating_point_v<T>) {
          if (low != low) return low;
          if (high != high) return high;
        }
        const T raised = x < low ? low : x;
        return raised > high ? high : raised;
      });
    });
  };
  t._clamp_min = [](TensorIterator& it) {
    visit_all(it.common_dtype(), [&]<class T>() {
      map_kernel(it, [](T x, T low) -> T { return low != low ? low : x < low ? low : x; });
    });
  };
  t._clamp_max = [](TensorIterator& it) {
    visit_all(it.common_dtype(), [&]<class T>() {
      map_kernel(it, [](T x, T high) -> T { return high != high ? high : x > high ? high : x; });
    });
  };
  t.lerp = [](TensorIterator& it) {
    // Two forms, so that the result is exact at both ends.
    visit_float(it.common_dtype(), [&]<class T>() {
      map_kernel(it, [](T a, T b, T w) -> T {
        return (w < T(0.5) && w > T(-0.5)) ? a + w * (b - a) : b - (b - a) * (T(1) - w);
      });
    });
  };
  t.addcmul = [](TensorIterator& it, const Scalar& value) {
    if (!is_floating(it.common_dtype())) check_fits(value, it.common_dtype());
    visit_numeric(it.common_dtype(), [&]<class T>() {
      const T v = value.to<T>();
      map_kernel(it, [v](T a, T b, T c) -> T { return static_cast<T>(a + v * b * c); });
    });
  };
  t.addcdiv = [](TensorIterator& it, const Scalar& value) {
    visit_float(it.common_dtype(), [&]<class T>() {
      const T v = value.to<T>();
      map_kernel(it, [v](T a, T b, T c) -> T { return a + v * (b / c); });
    });
  };
});

}  // namespace

void where_rows(const TensorIterator& it) {
  visit_all(it.dtype(0),
            [&]<class T>() { map_kernel(it, [](bool c, T a, T b) -> T { return c ? a : b; }); });
}

}  // namespace vt::cpu::VT_ISA
