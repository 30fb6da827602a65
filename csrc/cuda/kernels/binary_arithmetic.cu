// Arithmetic of two tensors: sums, products, quotients, maxima.
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
  __device__ T operator()(T a, T b) const {
    if constexpr (std::is_same_v<T, bool>)
      return a || (scale && b);
    else
      return a + scale * b;
  }
};

struct Divide {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a / b;
  }
};

/// The larger or smaller of two; a NaN wins, or with `skip_nan` loses.
struct Extreme {
  bool larger, skip_nan;
  template <class T>
  __device__ T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return skip_nan ? b : a;
      if (b != b) return skip_nan ? a : b;
    }
    return (larger ? a > b : a < b) ? a : b;
  }
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
    T scale;
    if constexpr (std::is_same_v<T, bool>)
      scale = alpha.to_bool();
    else
      scale = alpha.is_float() ? static_cast<T>(alpha.to_double() * sign)
                               : static_cast<T>(alpha.to_int() * static_cast<int64_t>(sign));
    if (scale == T(1))
      map_kernel<T, T, 2>(it, Add{});
    else
      map_kernel<T, T, 2>(it, AddScaled<T>{scale});
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.add = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, 1); };
  t.sub = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, -1); };
  t.mul = [](TensorIterator& it) { map_all(it, Multiply{}); };
  t.div = [](TensorIterator& it) {
    visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, Divide{}); });
  };
  t.maximum = [](TensorIterator& it) { map_all(it, Extreme{true, false}); };
  t.minimum = [](TensorIterator& it) { map_all(it, Extreme{false, false}); };
  t.fmax = [](TensorIterator& it) { map_all(it, Extreme{true, true}); };
  t.fmin = [](TensorIterator& it) { map_all(it, Extreme{false, true}); };
});

}  // namespace
}  // namespace vt::cuda
