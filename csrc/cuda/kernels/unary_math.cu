// Unary functions on floating types: exponentials, logarithms, roots, error functions.
#include "cuda/kernels/activation_math.cuh"
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Exp {
  template <class T>
  __device__ T operator()(T x) const {
    return exp(x);
  }
};
struct Exp2 {
  template <class T>
  __device__ T operator()(T x) const {
    return exp2(x);
  }
};
struct Expm1 {
  template <class T>
  __device__ T operator()(T x) const {
    return expm1(x);
  }
};
struct Log {
  template <class T>
  __device__ T operator()(T x) const {
    return log(x);
  }
};
struct Log2 {
  template <class T>
  __device__ T operator()(T x) const {
    return log2(x);
  }
};
struct Log10 {
  template <class T>
  __device__ T operator()(T x) const {
    return log10(x);
  }
};
struct Log1p {
  template <class T>
  __device__ T operator()(T x) const {
    return log1p(x);
  }
};
struct Sqrt {
  template <class T>
  __device__ T operator()(T x) const {
    return sqrt(x);
  }
};
struct Rsqrt {
  template <class T>
  __device__ T operator()(T x) const {
    return rsqrt(x);
  }
};
struct Reciprocal {
  template <class T>
  __device__ T operator()(T x) const {
    return T(1) / x;
  }
};
struct Sigmoid {
  template <class T>
  __device__ T operator()(T x) const {
    return sigmoid(x);
  }
};
struct Erf {
  template <class T>
  __device__ T operator()(T x) const {
    return erf(x);
  }
};
struct Erfc {
  template <class T>
  __device__ T operator()(T x) const {
    return erfc(x);
  }
};
struct Erfinv {
  template <class T>
  __device__ T operator()(T x) const {
    return erfinv(x);
  }
};

template <class F>
void map_float(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 1>(it, f); });
}

const RegisterCuda registered([](KernelTable& t) {
  t.exp = [](TensorIterator& it) { map_float(it, Exp{}); };
  t.exp2 = [](TensorIterator& it) { map_float(it, Exp2{}); };
  t.expm1 = [](TensorIterator& it) { map_float(it, Expm1{}); };
  t.log = [](TensorIterator& it) { map_float(it, Log{}); };
  t.log2 = [](TensorIterator& it) { map_float(it, Log2{}); };
  t.log10 = [](TensorIterator& it) { map_float(it, Log10{}); };
  t.log1p = [](TensorIterator& it) { map_float(it, Log1p{}); };
  t.sqrt = [](TensorIterator& it) { map_float(it, Sqrt{}); };
  t.rsqrt = [](TensorIterator& it) { map_float(it, Rsqrt{}); };
  t.reciprocal = [](TensorIterator& it) { map_float(it, Reciprocal{}); };
  t.sigmoid = [](TensorIterator& it) { map_float(it, Sigmoid{}); };
  t.erf = [](TensorIterator& it) { map_float(it, Erf{}); };
  t.erfc = [](TensorIterator& it) { map_float(it, Erfc{}); };
  t.erfinv = [](TensorIterator& it) { map_float(it, Erfinv{}); };
});

}  // namespace
}  // namespace vt::cuda
