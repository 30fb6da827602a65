// Unary functions on floating types: trigonometric and hyperbolic ones and their inverses.
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Sin {
  template <class T>
  __device__ T operator()(T x) const {
    return sin(x);
  }
};
struct Cos {
  template <class T>
  __device__ T operator()(T x) const {
    return cos(x);
  }
};
struct Tan {
  template <class T>
  __device__ T operator()(T x) const {
    return tan(x);
  }
};
struct Asin {
  template <class T>
  __device__ T operator()(T x) const {
    return asin(x);
  }
};
struct Acos {
  template <class T>
  __device__ T operator()(T x) const {
    return acos(x);
  }
};
struct Atan {
  template <class T>
  __device__ T operator()(T x) const {
    return atan(x);
  }
};
struct Sinh {
  template <class T>
  __device__ T operator()(T x) const {
    return sinh(x);
  }
};
struct Cosh {
  template <class T>
  __device__ T operator()(T x) const {
    return cosh(x);
  }
};
struct Tanh {
  template <class T>
  __device__ T operator()(T x) const {
    return tanh(x);
  }
};
struct Asinh {
  template <class T>
  __device__ T operator()(T x) const {
    return asinh(x);
  }
};
struct Acosh {
  template <class T>
  __device__ T operator()(T x) const {
    return acosh(x);
  }
};
struct Atanh {
  template <class T>
  __device__ T operator()(T x) const {
    return atanh(x);
  }
};

template <class F>
void map_float(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, f); });
}

const RegisterCuda registered([](KernelTable& t) {
  t.sin = [](TensorIterator& it) { map_float(it, Sin{}); };
  t.cos = [](TensorIterator& it) { map_float(it, Cos{}); };
  t.tan = [](TensorIterator& it) { map_float(it, Tan{}); };
  t.asin = [](TensorIterator& it) { map_float(it, Asin{}); };
  t.acos = [](TensorIterator& it) { map_float(it, Acos{}); };
  t.atan = [](TensorIterator& it) { map_float(it, Atan{}); };
  t.sinh = [](TensorIterator& it) { map_float(it, Sinh{}); };
  t.cosh = [](TensorIterator& it) { map_float(it, Cosh{}); };
  t.tanh = [](TensorIterator& it) { map_float(it, Tanh{}); };
  t.asinh = [](TensorIterator& it) { map_float(it, Asinh{}); };
  t.acosh = [](TensorIterator& it) { map_float(it, Acosh{}); };
  t.atanh = [](TensorIterator& it) { map_float(it, Atanh{}); };
});

}  // namespace
}  // namespace vt::cuda
