// Activations and their gradients.
#include "cuda/kernels/activation_math.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

struct Relu {
  template <class T>
  __device__ T operator()(T x) const {
    return x != x ? x : x > T(0) ? x : T(0);
  }
};
template <class T>
struct Threshold {
  T limit, other;
  __device__ T operator()(T x) const { return x <= limit ? other : x; }
};
template <class T>
struct ThresholdBackward {
  T limit;
  __device__ T operator()(T g, T x) const { return x <= limit ? T(0) : g; }
};
struct TanhBackward {
  template <class T>
  __device__ T operator()(T g, T y) const {
    return g * (T(1) - y * y);
  }
};
struct SigmoidBackward {
  template <class T>
  __device__ T operator()(T g, T y) const {
    return g * (T(1) - y) * y;
  }
};
struct Gelu {
  template <class T>
  __device__ T operator()(T x) const {
    return gelu(x);
  }
};
struct GeluBackward {
  template <class T>
  __device__ T operator()(T g, T x) const {
    return g * gelu_slope(x);
  }
};
struct GeluTanh {
  template <class T>
  __device__ T operator()(T x) const {
    return gelu_tanh(x);
  }
};
struct GeluTanhBackward {
  template <class T>
  __device__ T operator()(T g, T x) const {
    return g * gelu_tanh_slope(x);
  }
};
struct Silu {
  template <class T>
  __device__ T operator()(T x) const {
    return silu(x);
  }
};
struct SiluBackward {
  template <class T>
  __device__ T operator()(T g, T x) const {
    return g * silu_slope(x);
  }
};
struct Mish {
  template <class T>
  __device__ T operator()(T x) const {
    return mish(x);
  }
};
template <class T>
struct Softplus {
  T beta, threshold;
  __device__ T operator()(T x) const { return softplus(x, beta, threshold); }
};
template <class T>
struct LeakyRelu {
  T slope;
  __device__ T operator()(T x) const { return x > T(0) ? x : x * slope; }
};
template <class T>
struct LeakyReluBackward {
  T slope;
  __device__ T operator()(T g, T x) const { return x > T(0) ? g : g * slope; }
};
template <class T>
struct Elu {
  T positive, negative, inner;
  __device__ T operator()(T x) const {
    return x > T(0) ? x * positive : expm1(x * inner) * negative;
  }
};
template <class T>
struct Hardtanh {
  T low, high;
  __device__ T operator()(T x) const { return x < low ? low : x > high ? high : x; }
};

template <class F>
void map1(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, f); });
}
template <class F>
void map2(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, f); });
}

bool is_tanh_form(std::string_view approximate) {
  check(approximate == "none" || approximate == "tanh",
        "approximate argument must be either none or tanh, got '", approximate, "'");
  return approximate == "tanh";
}

/// A number an integer dtype of any width may hold; as the CPU kernels take it.
template <class T>
T bound(const Scalar& number, DType dtype) {
  if constexpr (std::is_same_v<T, int64_t>)
    return scalar_as<T>(number, dtype);
  else
    return number.to<T>();
}

const RegisterCuda registered([](KernelTable& t) {
  t.relu = [](TensorIterator& it) {
    visit_compute_numeric(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, Relu{}); });
  };
  t.threshold = [](TensorIterator& it, const Scalar& threshold, const Scalar& value) {
    const DType dtype = it.common_dtype();
    visit_compute_numeric(dtype, [&]<class T>() {
      map_kernel<T, T, 1>(it, Threshold<T>{bound<T>(threshold, dtype), bound<T>(value, dtype)});
    });
  };
  t.threshold_backward = [](TensorIterator& it, const Scalar& threshold) {
    visit_compute_float(it.common_dtype(), [&]<class T>() {
      map_kernel<T, T, 2>(it, ThresholdBackward<T>{threshold.to<T>()});
    });
  };
  t.tanh_backward = [](TensorIterator& it) { map2(it, TanhBackward{}); };
  t.sigmoid_backward = [](TensorIterator& it) { map2(it, SigmoidBackward{}); };
  t.gelu = [](TensorIterator& it, std::string_view approximate) {
    if (is_tanh_form(approximate))
      map1(it, GeluTanh{});
    else
      map1(it, Gelu{});
  };
  t.gelu_backward = [](TensorIterator& it, std::string_view approximate) {
    if (is_tanh_form(approximate))
      map2(it, GeluTanhBackward{});
    else
      map2(it, GeluBackward{});
  };
  t.silu = [](TensorIterator& it) { map1(it, Silu{}); };
  t.silu_backward = [](TensorIterator& it) { map2(it, SiluBackward{}); };
  t.mish = [](TensorIterator& it) { map1(it, Mish{}); };
  t.softplus = [](TensorIterator& it, const Scalar& beta, const Scalar& threshold) {
    visit_compute_float(it.common_dtype(), [&]<class T>() {
      map_kernel<T, T, 1>(it, Softplus<T>{beta.to<T>(), threshold.to<T>()});
    });
  };
  t.leaky_relu = [](TensorIterator& it, const Scalar& slope) {
    visit_compute_float(it.common_dtype(),
                        [&]<class T>() { map_kernel<T, T, 1>(it, LeakyRelu<T>{slope.to<T>()}); });
  };
  t.leaky_relu_backward = [](TensorIterator& it, const Scalar& slope) {
    visit_compute_float(it.common_dtype(), [&]<class T>() {
      map_kernel<T, T, 2>(it, LeakyReluBackward<T>{slope.to<T>()});
    });
  };
  t.elu = [](TensorIterator& it, const Scalar& alpha, const Scalar& scale,
             const Scalar& input_scale) {
    visit_compute_float(it.common_dtype(), [&]<class T>() {
      map_kernel<T, T, 1>(
          it, Elu<T>{scale.to<T>(), alpha.to<T>() * scale.to<T>(), input_scale.to<T>()});
    });
  };
  t.hardtanh = [](TensorIterator& it, const Scalar& min_val, const Scalar& max_val) {
    const DType dtype = it.common_dtype();
    visit_compute_numeric(dtype, [&]<class T>() {
      map_kernel<T, T, 1>(it, Hardtanh<T>{bound<T>(min_val, dtype), bound<T>(max_val, dtype)});
    });
  };
});

}  // namespace
}  // namespace vt::cuda
