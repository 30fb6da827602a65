// Arithmetic of two tensors: sums, products, quotients, maxima.
#include "cuda/kernels/loops.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

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

constexpr int kMixedWidth = 4;  // elements of a thread's access

/// out = f(a, b) in float; a and b are stored as A and B.
template <class A, class B, class F>
__global__ void __launch_bounds__(kBlock) mixed_kernel(F f, float* out, const A* a, const B* b, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x, first = i * kMixedWidth;
  if (first + kMixedWidth <= n) {
    const auto left = reinterpret_cast<const Vector<A, kMixedWidth>*>(a)[i];
    const auto right = reinterpret_cast<const Vector<B, kMixedWidth>*>(b)[i];
    Vector<float, kMixedWidth> result;
#pragma unroll
    for (int k = 0; k < kMixedWidth; ++k)
      result.value[k] = f(convert<float>(left.value[k]), convert<float>(right.value[k]));
    reinterpret_cast<Vector<float, kMixedWidth>*>(out)[i] = result;
  } else {
    for (int64_t k = first; k < n; ++k) out[k] = f(convert<float>(a[k]), convert<float>(b[k]));
  }
}

/// float32 and a 16-bit float, both dense: sums of gradients and residuals under autocast. False for
/// all else.
template <class F>
bool map_mixed(TensorIterator& it, const F& f) {
  if (it.ndim() != 1 || it.numel() == 0 || it.dtype(0) != DType::Float32 ||
      it.common_dtype() != DType::Float32 || it.dtype(1) == it.dtype(2))
    return false;
  const int wide = it.dtype(1) == DType::Float32 ? 1 : 2, narrow = 3 - wide;
  if (it.dtype(wide) != DType::Float32 || !is_reduced_float(it.dtype(narrow))) return false;
  for (int i = 0; i < 3; ++i) {
    const int64_t size = item_size(it.dtype(i));
    if (it.on_host(i) || it.stride(i, 0) != size ||
        reinterpret_cast<uintptr_t>(it.data(i)) % static_cast<uintptr_t>(size * kMixedWidth) != 0)
      return false;
  }
  const Launch launch(it.device());
  const auto go = [&]<class A, class B>(A, B) {
    launch(mixed_kernel<A, B, F>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(it.numel(), kBlock * kMixedWidth))),
           dim3(kBlock), 0, f, reinterpret_cast<float*>(it.data(0)),
           reinterpret_cast<const A*>(it.data(1)), reinterpret_cast<const B*>(it.data(2)),
           it.numel());
  };
  const auto with = [&]<class H>(H half) {
    if (wide == 1)
      go(0.f, half);
    else
      go(half, 0.f);
  };
  if (it.dtype(narrow) == DType::BFloat16)
    with(__nv_bfloat16{});
  else
    with(__half{});
  return true;
}

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
    if (scale == T(1)) {
      if constexpr (std::is_same_v<T, float>) {
        if (map_mixed(it, Add{})) return;
      }
      map_kernel<T, T, 2>(it, Add{});
    } else {
      map_kernel<T, T, 2>(it, AddScaled<T>{scale});
    }
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
