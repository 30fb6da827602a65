// The inner loops of pointwise kernels: `map_kernel<T, R, Arity>(it, f)` applies a device functor
// to every element of a TensorIterator. Dense operands of one dtype go through 16-byte accesses;
// everything else (strides, broadcasting, mixed dtypes) through one kernel that converts on the
// way, so a functor is written once per compute type.
#pragma once

#include <algorithm>
#include <array>

#include "core/tensor_iterator.h"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/offsets.cuh"

namespace vt::cuda {

inline constexpr int kBlock = 256;
inline constexpr int64_t kMaxElements = int64_t{1} << 30;  // of one launch

namespace detail {

/// Inputs of a dense launch. A null pointer means one value for all elements, held here.
template <class T, int Arity>
struct DenseInputs {
  const char* data[Arity > 0 ? Arity : 1];
  T value[Arity > 0 ? Arity : 1];
};

template <class T, class R, class F, class... A>
__device__ inline R apply(const F& f, const T (&args)[1], std::integral_constant<int, 0>) {
  return f();
}
template <class T, class R, class F>
__device__ inline R apply(const F& f, const T (&a)[1], std::integral_constant<int, 1>) {
  return f(a[0]);
}
template <class T, class R, class F>
__device__ inline R apply(const F& f, const T (&a)[2], std::integral_constant<int, 2>) {
  return f(a[0], a[1]);
}
template <class T, class R, class F>
__device__ inline R apply(const F& f, const T (&a)[3], std::integral_constant<int, 3>) {
  return f(a[0], a[1], a[2]);
}

/// S: stored type of the inputs; Q: of the output.
template <class S, class Q, class T, class R, int Arity, class F>
__global__ void __launch_bounds__(kBlock)
    dense_kernel(F f, char* out, DenseInputs<T, Arity> in, int64_t n) {
  constexpr int kArgs = Arity > 0 ? Arity : 1;
  constexpr int kWidth = 16 / (sizeof(S) > sizeof(Q) ? sizeof(S) : sizeof(Q));
  const int64_t first = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kWidth;
  if (first >= n) return;
  Q* target = reinterpret_cast<Q*>(out) + first;
  if (first + kWidth <= n) {
    Vector<S, kWidth> loaded[kArgs];
#pragma unroll
    for (int a = 0; a < Arity; ++a) {
      if (in.data[a])
        loaded[a] = reinterpret_cast<const Vector<S, kWidth>*>(in.data[a])[first / kWidth];
    }
    Vector<Q, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      T args[kArgs];
#pragma unroll
      for (int a = 0; a < Arity; ++a)
        args[a] = in.data[a] ? convert<T>(loaded[a].value[k]) : in.value[a];
      result.value[k] = convert<Q>(apply<T, R>(f, args, std::integral_constant<int, Arity>()));
    }
    *reinterpret_cast<Vector<Q, kWidth>*>(target) = result;
    return;
  }
  for (int64_t i = first; i < n; ++i) {
    T args[kArgs];
#pragma unroll
    for (int a = 0; a < Arity; ++a)
      args[a] = in.data[a] ? convert<T>(reinterpret_cast<const S*>(in.data[a])[i]) : in.value[a];
    *target++ = convert<Q>(apply<T, R>(f, args, std::integral_constant<int, Arity>()));
  }
}

/// Operands of a strided launch: byte strides, their dtypes, and host numbers by value.
template <class T, int Arity>
struct StridedOperands {
  char* data[Arity + 1];
  T value[Arity + 1];
  DType dtype[Arity + 1];
  DType round[Arity + 1];  // a 16-bit dtype inputs are first rounded to, else Bool
  Offsets<Arity + 1> offsets;
};

inline constexpr int kStridedPerThread = 4;

template <class T, class R, int Arity, class F>
__global__ void __launch_bounds__(kBlock)
    strided_kernel(F f, const __grid_constant__ StridedOperands<T, Arity> ops, uint32_t n) {
  constexpr int kArgs = Arity > 0 ? Arity : 1;
  const uint32_t base = blockIdx.x * (kBlock * kStridedPerThread) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kStridedPerThread; ++k) {
    const uint32_t i = base + k * kBlock;
    if (i >= n) return;
    int64_t offset[Arity + 1];
    ops.offsets.get(i, offset);
    T args[kArgs];
#pragma unroll
    for (int a = 0; a < Arity; ++a) {
      args[a] = ops.data[a + 1] ? load_as<T>(ops.data[a + 1] + offset[a + 1], ops.dtype[a + 1])
                                : ops.value[a + 1];
      args[a] = round_to(args[a], ops.round[a + 1]);
    }
    store_as<R>(ops.data[0] + offset[0], ops.dtype[0],
                apply<T, R>(f, args, std::integral_constant<int, Arity>()));
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Runs the functor over sub-boxes small enough for 32-bit indices and few enough dimensions.
template <class T, class R, int Arity, class F>
void strided_boxes(const Launch& launch, const F& f, StridedOperands<T, Arity>& ops,
                   const int64_t* shape, int64_t (*strides)[kMaxDims], int ndim, int64_t numel) {
  if (numel > kMaxElements || ndim > kMaxOffsetDims) {
    // Halve the outermost dimension; once it is 1, it goes.
    const int d = ndim - 1;
    if (shape[d] == 1) {
      strided_boxes<T, R, Arity>(launch, f, ops, shape, strides, ndim - 1, numel);
      return;
    }
    int64_t part[kMaxDims];
    std::copy(shape, shape + ndim, part);
    const int64_t half = ndim > kMaxOffsetDims ? 1 : shape[d] / 2;
    std::array<char*, Arity + 1> start;
    std::copy(ops.data, ops.data + Arity + 1, start.begin());
    for (int64_t at = 0; at < shape[d]; at += half) {
      part[d] = std::min(half, shape[d] - at);
      for (int i = 0; i <= Arity; ++i)
        ops.data[i] = start[i] ? start[i] + at * strides[i][d] : nullptr;
      strided_boxes<T, R, Arity>(launch, f, ops, part, strides, ndim, numel / shape[d] * part[d]);
    }
    std::copy(start.begin(), start.end(), ops.data);
    return;
  }
  ops.offsets.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    ops.offsets.extent[d] = FastDivisor(static_cast<uint32_t>(shape[d]));
    for (int i = 0; i <= Arity; ++i) ops.offsets.stride[i][d] = strides[i][d];
  }
  const auto n = static_cast<uint32_t>(numel);
  launch(strided_kernel<T, R, Arity, F>, dim3(ceil_div(n, uint32_t{kBlock * kStridedPerThread})),
         dim3(kBlock), 0, f, ops, n);
}

/// A number in host memory as the kernel sees it: rounded to the common dtype first.
template <class T>
T host_value(const TensorIterator& it, int operand) {
  const Scalar value = load_scalar(it.data(operand), it.dtype(operand));
  if constexpr (std::is_same_v<T, float>) {
    const auto x = static_cast<float>(value.to_double());
    if (it.compute_dtype(operand) == DType::Float16) return to_float(to_half(x));
    if (it.compute_dtype(operand) == DType::BFloat16) return to_float(to_bfloat16(x));
    return x;
  } else {
    return value.to<T>();
  }
}

template <class T, class R, int Arity, class F>
void run_strided(const Launch& launch, TensorIterator& it, const F& f) {
  StridedOperands<T, Arity> ops;
  int64_t strides[Arity + 1][kMaxDims];
  for (int i = 0; i <= Arity; ++i) {
    const bool host = it.on_host(i);
    ops.data[i] = host ? nullptr : it.data(i);
    if (host) ops.value[i] = host_value<T>(it, i);
    ops.dtype[i] = it.dtype(i);
    const DType common = it.compute_dtype(i);
    ops.round[i] = common != it.dtype(i) && is_reduced_float(common) ? common : DType::Bool;
    for (int d = 0; d < it.ndim(); ++d) strides[i][d] = host ? 0 : it.stride(i, d);
  }
  strided_boxes<T, R, Arity>(launch, f, ops, it.shape(), strides, it.ndim(), it.numel());
}

/// Dense if all inputs are stored as S (or one host number), the output as Q, 16-byte aligned.
template <class S, class Q, class T, class R, int Arity, class F>
bool run_dense(const Launch& launch, TensorIterator& it, const F& f) {
  if (it.ndim() != 1 || it.stride(0, 0) != sizeof(Q) || !aligned(it.data(0))) return false;
  DenseInputs<T, Arity> in;
  for (int a = 0; a < Arity; ++a) {
    if (it.on_host(a + 1)) {
      in.data[a] = nullptr;
      in.value[a] = host_value<T>(it, a + 1);
      continue;
    }
    if (it.dtype(a + 1) != it.compute_dtype(a + 1) || it.stride(a + 1, 0) != sizeof(S) ||
        !aligned(it.data(a + 1)))
      return false;
    in.data[a] = it.data(a + 1);
  }
  constexpr int64_t kWidth = 16 / (sizeof(S) > sizeof(Q) ? sizeof(S) : sizeof(Q));
  char* out = it.data(0);
  for (int64_t at = 0; at < it.numel(); at += kMaxElements) {
    const int64_t n = std::min(kMaxElements, it.numel() - at);
    launch(dense_kernel<S, Q, T, R, Arity, F>, dim3(ceil_div(n, kBlock * kWidth)), dim3(kBlock), 0,
           f, out, in, n);
    out += n * sizeof(Q);
    for (int a = 0; a < Arity; ++a) {
      if (in.data[a]) in.data[a] += n * sizeof(S);
    }
  }
  return true;
}

}  // namespace detail

/// out = f(inputs…) for every element. T: the compute type of the inputs (float for 16-bit
/// floats); R: what f returns; the output's dtype is the iterator's.
template <class T, class R, int Arity, class F>
void map_kernel(TensorIterator& it, const F& f) {
  if (it.numel() == 0) return;
  const Launch launch(it.device());
  const DType from = it.num_operands() > 1 ? it.common_dtype() : it.dtype(0), to = it.dtype(0);
  const auto dense = [&]<class S>() {
    using Q = std::conditional_t<std::is_same_v<R, T>, S, R>;
    return detail::run_dense<S, Q, T, R, Arity>(launch, it, f);
  };
  constexpr bool kSame = std::is_same_v<R, T>;
  if (kSame ? from == to : to == DTypeOf<R>::value) {
    bool done = false;
    if constexpr (std::is_same_v<T, float>) {
      done = from == DType::Float32    ? dense.template operator()<float>()
             : from == DType::BFloat16 ? dense.template operator()<__nv_bfloat16>()
             : from == DType::Float16  ? dense.template operator()<__half>()
                                       : false;
    } else if constexpr (std::is_same_v<T, int64_t>) {
      // All integers compute in 64 bits; the common ones have dense loops.
      done = from == DType::Int64   ? dense.template operator()<int64_t>()
             : from == DType::Int32 ? dense.template operator()<int32_t>()
                                    : false;
    } else {
      done = dense.template operator()<T>();
    }
    if (done) return;
  }
  detail::run_strided<T, R, Arity>(launch, it, f);
}

/// Calls `f.template operator()<T>()` with the compute type of a dtype: float for 16-bit floats,
/// int64_t for every integer (stores wrap to the narrow type).
template <class F>
void visit_compute(DType dtype, F&& f) {
  if (dtype == DType::Bool)
    f.template operator()<bool>();
  else if (dtype == DType::Float64)
    f.template operator()<double>();
  else if (is_floating(dtype))
    f.template operator()<float>();
  else
    f.template operator()<int64_t>();
}
template <class F>
void visit_compute_numeric(DType dtype, F&& f) {
  if (dtype == DType::Float64)
    f.template operator()<double>();
  else if (is_floating(dtype))
    f.template operator()<float>();
  else
    f.template operator()<int64_t>();
}
template <class F>
void visit_compute_float(DType dtype, F&& f) {
  if (dtype == DType::Float64)
    f.template operator()<double>();
  else if (is_floating(dtype))
    f.template operator()<float>();
  else
    fail(ErrorKind::NotImplemented, "not implemented for '", dtype, "'");
}

}  // namespace vt::cuda
