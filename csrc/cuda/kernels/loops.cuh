// The inner loops of pointwise kernels: `map_kernel<T, R, Arity>(it, f)` applies a device functor
// to every element of a TensorIterator. Operands of one dtype whose rows are dense (or one element
// repeated: broadcasting) go through 16-byte accesses; everything else (other strides, mixed
// dtypes) through one kernel that converts on the way, so a functor is written once per compute
// type.
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

/// One input of a launch over rows: rows of vectors, one element a row, or, without data, a number
/// held here.
template <class T>
struct RowInput {
  const char* data = nullptr;
  bool vectors = false;
  DType dtype = DType::Float32, round = DType::Bool;  // of single elements
  T value = T();
};
inline constexpr int kRowDims = 4;  // that count rows
template <class T, int Arity>
struct RowOperands {
  char* out;
  RowInput<T> in[Arity > 0 ? Arity : 1];
  bool one_row;
  FastDivisor row_vectors;
  Offsets<Arity + 1, kRowDims> row;
};

template <class S, int N>
__device__ inline Vector<S, N> load_vector(const char* row, uint32_t column) {
  return reinterpret_cast<const Vector<S, N>*>(row)[column];
}

/// Elements of one 16-byte access.
template <class S, class Q>
inline constexpr int kRowWidth = 16 / (sizeof(S) > sizeof(Q) ? sizeof(S) : sizeof(Q));

/// Rows of whole vectors, or one row of any length. S0, S: stored types of the first input and of
/// the others; Q: of the output.
template <class S0, class S, class Q, class T, class R, int Arity, class F>
__global__ void __launch_bounds__(kBlock)
    rows_kernel(F f, const __grid_constant__ RowOperands<T, Arity> ops, uint32_t n) {
  constexpr int kArgs = Arity > 0 ? Arity : 1;
  constexpr int kWidth = kRowWidth<S, Q>;
  constexpr std::integral_constant<int, Arity> arity;
  const uint32_t index = blockIdx.x * kBlock + threadIdx.x;
  const uint32_t first = index * kWidth;
  if (first >= n) return;
  uint32_t column = index;
  int64_t offset[Arity + 1] = {};
  if (!ops.one_row) {
    const uint32_t row = ops.row_vectors.divide(index);
    column = index - row * ops.row_vectors.divisor;
    ops.row.get(row, offset);
  }
  T fixed[kArgs];
#pragma unroll
  for (int a = 0; a < Arity; ++a) {
    const RowInput<T>& in = ops.in[a];
    fixed[a] = in.value;
    if (in.data && !in.vectors)
      fixed[a] = round_to(load_as<T>(in.data + offset[a + 1], in.dtype), in.round);
  }
  char* target = ops.out + offset[0];
  if (first + kWidth <= n) {
    Vector<S0, kWidth> head;
    Vector<S, kWidth> loaded[kArgs];
#pragma unroll
    for (int a = 0; a < Arity; ++a) {
      const RowInput<T>& in = ops.in[a];
      if (!in.vectors) continue;
      if constexpr (!std::is_same_v<S0, S>) {
        if (a == 0) {
          head = load_vector<S0, kWidth>(in.data + offset[a + 1], column);
          continue;
        }
      }
      loaded[a] = load_vector<S, kWidth>(in.data + offset[a + 1], column);
    }
    Vector<Q, kWidth> result;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      T args[kArgs];
#pragma unroll
      for (int a = 0; a < Arity; ++a) {
        if (!ops.in[a].vectors)
          args[a] = fixed[a];
        else if (a == 0 && !std::is_same_v<S0, S>)
          args[a] = convert<T>(head.value[k]);
        else
          args[a] = convert<T>(loaded[a].value[k]);
      }
      result.value[k] = convert<Q>(apply<T, R>(f, args, arity));
    }
    reinterpret_cast<Vector<Q, kWidth>*>(target)[column] = result;
    return;
  }
  for (uint32_t i = first; i < n; ++i) {  // only the end of a single row
    T args[kArgs];
#pragma unroll
    for (int a = 0; a < Arity; ++a) {
      args[a] = fixed[a];
      if (!ops.in[a].vectors) continue;
      if (a == 0 && !std::is_same_v<S0, S>)
        args[a] = convert<T>(reinterpret_cast<const S0*>(ops.in[a].data)[i]);
      else
        args[a] = convert<T>(reinterpret_cast<const S*>(ops.in[a].data)[i]);
    }
    reinterpret_cast<Q*>(target)[i] = convert<Q>(apply<T, R>(f, args, arity));
  }
}

/// Operands of a strided launch: byte strides, their dtypes, and host numbers by value.
template <class T, int Arity>
struct StridedOperands {
  char* data[Arity + 1];
  T value[Arity + 1];
  DType dtype[Arity + 1];
  DType round[Arity + 1];  // the narrower dtype inputs are first converted to, else Bool
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

/// The dtype an operand is converted to before it takes part, where its compute type is wider
/// (16-bit floats, narrow integers); else Bool.
inline DType rounding_of(const TensorIterator& it, int operand) {
  const DType common = it.compute_dtype(operand);
  const bool narrow = is_reduced_float(common) || (!is_floating(common) && item_size(common) < 8);
  return narrow && common != it.dtype(operand) ? common : DType::Bool;
}

/// A number in host memory as the kernel sees it: in the common dtype.
template <class T>
T host_value(const TensorIterator& it, int operand) {
  return scalar_as<T>(load_scalar(it.data(operand), it.dtype(operand)), it.compute_dtype(operand));
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
    ops.round[i] = rounding_of(it, i);
    for (int d = 0; d < it.ndim(); ++d) strides[i][d] = host ? 0 : it.stride(i, d);
  }
  strided_boxes<T, R, Arity>(launch, f, ops, it.shape(), strides, it.ndim(), it.numel());
}

/// Rows if the output is dense along the first dimension and every input is that and stored as
/// `stored` (whose type is S; a mask as bool, S0), or has one element a row. False where the
/// operands are otherwise, or not aligned.
template <class S0, class S, class Q, class T, class R, int Arity, class F>
bool run_rows(const Launch& launch, TensorIterator& it, DType stored, const F& f) {
  constexpr int64_t kWidth = kRowWidth<S, Q>;
  const int ndim = it.ndim();
  const int64_t columns = it.shape()[0];
  if (ndim > 1 + kRowDims || (ndim > 1 && columns % kWidth != 0)) return false;
  const auto vectors = [&](int i, int64_t size) {
    const int64_t access = size * kWidth;
    bool fit = it.stride(i, 0) == size && reinterpret_cast<intptr_t>(it.data(i)) % access == 0;
    for (int d = 1; d < ndim; ++d) fit = fit && it.stride(i, d) % access == 0;
    return fit;
  };
  if (!vectors(0, sizeof(Q))) return false;
  // Parts of at most kMaxElements along the last dimension.
  const int last = ndim - 1;
  const int64_t extent = it.shape()[last], inner = it.numel() / extent;
  if (inner > kMaxElements) return false;
  const int64_t step = kMaxElements / inner;

  RowOperands<T, Arity> ops;
  ops.out = it.data(0);
  for (int a = 0; a < Arity; ++a) {
    RowInput<T>& in = ops.in[a];
    const int i = a + 1;
    if (it.on_host(i)) {
      in.value = host_value<T>(it, i);
      continue;
    }
    in.data = it.data(i);
    in.dtype = it.dtype(i);
    in.round = rounding_of(it, i);
    if (it.stride(i, 0) == 0) continue;
    const DType wanted = a == 0 && !std::is_same_v<S0, S> ? DType::Bool : stored;
    const auto size = static_cast<int64_t>(a == 0 ? sizeof(S0) : sizeof(S));
    if (it.dtype(i) != wanted || !vectors(i, size)) return false;
    in.vectors = true;
  }
  ops.one_row = ndim == 1;
  if (ndim > 1) ops.row_vectors = FastDivisor(static_cast<uint32_t>(columns / kWidth));
  ops.row.ndim = last;
  for (int d = 1; d < ndim; ++d) {
    const int64_t here = d == last ? std::min(extent, step) : it.shape()[d];
    ops.row.extent[d - 1] = FastDivisor(static_cast<uint32_t>(here));
    for (int i = 0; i <= Arity; ++i) ops.row.stride[i][d - 1] = it.on_host(i) ? 0 : it.stride(i, d);
  }
  for (int64_t at = 0; at < extent; at += step) {
    const int64_t n = std::min(step, extent - at) * inner;
    launch(rows_kernel<S0, S, Q, T, R, Arity, F>, dim3(ceil_div(n, kBlock * kWidth)), dim3(kBlock),
           0, f, ops, static_cast<uint32_t>(n));
    ops.out += step * it.stride(0, last);
    for (int a = 0; a < Arity; ++a) {
      if (ops.in[a].data) ops.in[a].data += step * it.stride(a + 1, last);
    }
  }
  return true;
}

/// `kMasked`: the first input is bool, the others and the output of one dtype.
template <class T, class R, int Arity, bool kMasked, class F>
void map(TensorIterator& it, const F& f) {
  if (it.numel() == 0) return;
  const Launch launch(it.device());
  const DType to = it.dtype(0);
  const DType from = kMasked || it.num_operands() == 1 ? to : it.common_dtype();
  const auto dense = [&]<class S>() {
    using S0 = std::conditional_t<kMasked, bool, S>;
    using Q = std::conditional_t<std::is_same_v<R, T>, S, R>;
    return run_rows<S0, S, Q, T, R, Arity>(launch, it, from, f);
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
  run_strided<T, R, Arity>(launch, it, f);
}

}  // namespace detail

struct Identity {
  template <class T>
  __device__ T operator()(T x) const {
    return x;
  }
};

/// out = f(inputs…) for every element. T: the compute type of the inputs (float for 16-bit
/// floats); R: what f returns; the output's dtype is the iterator's.
template <class T, class R, int Arity, class F>
void map_kernel(TensorIterator& it, const F& f) {
  detail::map<T, R, Arity, false>(it, f);
}

/// The same with a bool tensor as first input, which f sees as 0 or 1 of type T. The iterator does
/// not promote; T is the compute type of the output.
template <class T, int Arity, class F>
void map_masked_kernel(TensorIterator& it, const F& f) {
  detail::map<T, T, Arity, true>(it, f);
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
void visit_compute_integral(DType dtype, F&& f) {
  if (is_floating(dtype) || dtype == DType::Bool)
    fail(ErrorKind::NotImplemented, "not implemented for '", dtype, "'");
  f.template operator()<int64_t>();
}
template <class F>
void visit_compute_numeric(DType dtype, F&& f) {
  if (dtype == DType::Bool) fail(ErrorKind::NotImplemented, "not implemented for 'Bool'");
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
