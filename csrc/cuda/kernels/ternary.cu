// Three operands: where, clamp, lerp, addcmul, addcdiv, masked_fill.
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Where {
  template <class T>
  __device__ T operator()(T condition, T a, T b) const {
    return condition != T(0) ? a : b;
  }
};

struct Clamp {
  template <class T>
  __device__ T operator()(T x, T low, T high) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (low != low) return low;
      if (high != high) return high;
    }
    const T raised = x < low ? low : x;
    return raised > high ? high : raised;
  }
};
struct ClampMin {
  template <class T>
  __device__ T operator()(T x, T low) const {
    return low != low ? low : x < low ? low : x;
  }
};
struct ClampMax {
  template <class T>
  __device__ T operator()(T x, T high) const {
    return high != high ? high : x > high ? high : x;
  }
};

/// Two forms, so that the result is exact at both ends.
struct Lerp {
  template <class T>
  __device__ T operator()(T a, T b, T w) const {
    return w < T(0.5) && w > T(-0.5) ? a + w * (b - a) : b - (b - a) * (T(1) - w);
  }
};
template <class T>
struct AddProduct {
  T scale;
  __device__ T operator()(T a, T b, T c) const { return a + scale * b * c; }
};
template <class T>
struct AddQuotient {
  T scale;
  __device__ T operator()(T a, T b, T c) const { return a + scale * (b / c); }
};

void where(const Tensor& out, const Tensor& condition, const Tensor& self, const Tensor& other) {
  Tensor target = out;
  TensorIterator it;
  Tensor* outs[] = {&target};
  const Tensor* ins[] = {&condition, &self, &other};
  it.build(outs, ins, {.promote = Promote::None, .output_dtype = out.dtype(), .op = "where"});
  visit_compute(out.dtype(), [&]<class T>() { map_masked_kernel<T, 3>(it, Where{}); });
}

/// where(mask, value, self) into self.
void masked_fill(const Tensor& self, const Tensor& mask, const Tensor& value) {
  check(value.dim() == 0,
        "masked_fill_ only supports a 0-dimensional value tensor, but got tensor with ",
        value.dim(), " dimension(s).");
  check(mask.dtype() == DType::Bool,
        "masked_fill_ only supports boolean masks, but got mask with dtype ", mask.dtype());
  Tensor fill = value;
  if (value.dtype() != self.dtype()) {
    fill = empty({}, self.dtype(), value.device());
    kernels_for(value.device().type).copy_(fill, value, true);
  }
  where(self, mask, fill, self);
}

const RegisterCuda registered([](KernelTable& t) {
  t._where = where;
  t.masked_fill_ = masked_fill;
  t._clamp = [](TensorIterator& it) {
    visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 3>(it, Clamp{}); });
  };
  t._clamp_min = [](TensorIterator& it) {
    visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, ClampMin{}); });
  };
  t._clamp_max = [](TensorIterator& it) {
    visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, ClampMax{}); });
  };
  t.lerp = [](TensorIterator& it) {
    visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 3>(it, Lerp{}); });
  };
  t.addcmul = [](TensorIterator& it, const Scalar& value) {
    if (!is_floating(it.common_dtype())) check_fits(value, it.common_dtype());
    visit_compute_numeric(it.common_dtype(), [&]<class T>() {
      map_kernel<T, T, 3>(it, AddProduct<T>{value.to<T>()});
    });
  };
  t.addcdiv = [](TensorIterator& it, const Scalar& value) {
    visit_compute_float(it.common_dtype(),
                        [&]<class T>() { map_kernel<T, T, 3>(it, AddQuotient<T>{value.to<T>()}); });
  };
});

}  // namespace
}  // namespace vt::cuda
