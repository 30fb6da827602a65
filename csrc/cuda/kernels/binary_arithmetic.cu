// Arithmetic of two tensors.
#include <cmath>
#include <optional>

#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    if constexpr (std::is_same_v<T, bool>)
      return a || b;
    else
      return a + b;
  }
};

struct Multiply {
  template <class T>
  __device__ T operator()(T a, T b) const {
    if constexpr (std::is_same_v<T, bool>)
      return a && b;
    else
      return a * b;
  }
};

template <class T>
struct AddScaled {
  T scale;
  __device__ T operator()(T a, T b) const { return a + scale * b; }
};

template <class F>
void map_all(TensorIterator& it, const F& f) {
  visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, f); });
}

void add_scaled(TensorIterator& it, const Scalar& alpha, double sign) {
  const DType dtype = it.common_dtype();
  check(is_floating(dtype) || !alpha.is_float(),
        "For integral input tensors, argument alpha must not be a floating point number.");
  check(dtype == DType::Bool || !alpha.is_bool(),
        "Boolean alpha only supported for Boolean results.");
  visit_compute(dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, bool>) {
      if (alpha.to_bool())
        map_kernel<bool, bool, 2>(it, Add{});
      else
        map_kernel<bool, bool, 2>(it, AddScaled<bool>{false});
    } else {
      const T scale = alpha.is_float()
                          ? static_cast<T>(alpha.to_double() * sign)
                          : static_cast<T>(alpha.to_int() * static_cast<int64_t>(sign));
      if (scale == T(1))
        map_kernel<T, T, 2>(it, Add{});
      else
        map_kernel<T, T, 2>(it, AddScaled<T>{scale});
    }
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.add = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, 1); };
  t.sub = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, -1); };
  t.mul = [](TensorIterator& it) { map_all(it, Multiply{}); };
});

}  // namespace
}  // namespace vt::cuda
