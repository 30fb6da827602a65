// Rows on the device: the threads that share a row, their reductions in a fixed order, and walks
// over a row in 16-byte pieces. A row belongs to a warp (block of 32 x rows threads) or to a whole
// block (block of threads x 1); the same kernel serves both.
#pragma once

#include <limits>

#include "core/tensor.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// `t` as `dtype`, contiguous: itself where it already is, else a copy. Undefined stays undefined.
inline Tensor dense_as(const Tensor& t, DType dtype) {
  if (!t.defined() || (t.dtype() == dtype && t.is_contiguous())) return t;
  const Tensor out = empty(t.sizes(), dtype, t.device());
  copy(out, t, true);
  return out;
}
inline Tensor dense(const Tensor& t) { return t.defined() ? contiguous(t) : t; }

/// Double where the operand is double, else float.
inline DType statistics_dtype(DType dtype) {
  return dtype == DType::Float64 ? DType::Float64 : DType::Float32;
}

/// Elements of S that move in one 16-byte access; doubles go one by one.
template <class S>
inline constexpr int kWidthOf = sizeof(S) >= 8 ? 1 : 16 / static_cast<int>(sizeof(S));

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Elements of a row a thread keeps in registers.
template <class T>
inline constexpr int kRowItems = sizeof(T) == 8 ? 8 : 32;
inline constexpr int kRowThreads = 512;  // the most a row's block has
/// Rows up to this length fit the registers of one block.
template <class T>
inline constexpr int64_t kCachedRow = int64_t{kRowItems<T>} * kRowThreads;

/// How `rows` rows of `n` elements are spread: a warp each, or a block each.
struct RowLaunch {
  dim3 grid, block;
  RowLaunch(int64_t rows, int64_t n, int items) {
    if (n <= int64_t{kWarp} * items) {
      block = dim3(kWarp, 4);
    } else {
      // Half of the registers' room, so that loads of a row are spread over more threads.
      const int64_t warps = ceil_div<int64_t>(n, kWarp * items / 2);
      block = dim3(static_cast<unsigned>(std::min<int64_t>(warps * kWarp, kRowThreads)), 1);
    }
    const int64_t blocks = ceil_div<int64_t>(rows, block.y);
    grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int>::max())));
  }
};

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
/// The larger number; NaN loses, so what needs NaN must carry it elsewhere (a sum does).
struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

/// Reduces over the threads of a row; all of them get the result. `shared`: 16 places, used only
/// where the row belongs to a block.
template <class T, class Op>
__device__ inline T row_reduce(T value, const Op& op, T* shared) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
  if (blockDim.x == kWarp) return value;
  __syncthreads();  // an earlier reduction's results have been read
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) value = op(value, shared[w]);
  return value;
}

template <class S, class T, int W>
__device__ inline void load_piece(const S* p, T (&values)[W]) {
  const Vector<S, W> v = *reinterpret_cast<const Vector<S, W>*>(p);
#pragma unroll
  for (int k = 0; k < W; ++k) values[k] = convert<T>(v.value[k]);
}
template <class S, class T, int W>
__device__ inline void store_piece(S* p, const T (&values)[W]) {
  Vector<S, W> v;
#pragma unroll
  for (int k = 0; k < W; ++k) v.value[k] = convert<S>(values[k]);
  *reinterpret_cast<Vector<S, W>*>(p) = v;
}

template <int W>
using Width = std::integral_constant<int, W>;

/// Calls f(Width<w>, index) so that the calls of all threads of a row cover [0, n): single elements
/// up to the first 16-byte boundary of `row` and after the last, W at a time between. Every operand
/// read or written by f in W's must lie as `row` does against that boundary.
template <int W, class S, class F>
__device__ inline void for_each_piece(const S* row, int64_t n, F&& f) {
  const int lane = threadIdx.x, threads = blockDim.x;
  if constexpr (W == 1) {
    for (int64_t i = lane; i < n; i += threads) f(Width<1>(), i);
  } else {
    const int gap = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(S));
    const int64_t head = gap < n ? gap : n, tail = head + (n - head) / W * W;
    if (lane < head) f(Width<1>(), int64_t{lane});
    for (int64_t i = head + int64_t{lane} * W; i < tail; i += int64_t{threads} * W)
      f(Width<W>(), i);
    if (lane < n - tail) f(Width<1>(), tail + lane);
  }
}

/// A weight or bias: stored as the rows are (S) or already in the compute type (T); may be null.
template <class S, class T>
struct Parameter {
  const void* data = nullptr;
  bool computed = false;

  template <int W>
  __device__ void load(int64_t i, T (&values)[W], T otherwise) const {
    if (!data) {
#pragma unroll
      for (int k = 0; k < W; ++k) values[k] = otherwise;
    } else if (computed) {
#pragma unroll
      for (int k = 0; k < W; ++k) values[k] = static_cast<const T*>(data)[i + k];
    } else {
      load_piece<S, T, W>(static_cast<const S*>(data) + i, values);
    }
  }
};

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

template <class T>
__device__ inline T minus_infinity() {
  return -std::numeric_limits<T>::infinity();
}

/// A running softmax: the largest value seen and the sum of exp(value - largest).
template <class T>
struct OnlineSum {
  T top = minus_infinity<T>(), total = T(0);

  /// What values are shifted by: finite as long as everything seen is -inf.
  __device__ static T shift(T top) { return top == minus_infinity<T>() ? T(0) : top; }

  template <int W>
  __device__ void add(const T (&x)[W]) {
    T next = top;
#pragma unroll
    for (int k = 0; k < W; ++k) next = Larger()(next, x[k]);
    const T by = shift(next);
    T sum = T(0);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += exp_of(x[k] - by);
    total = total * exp_of(top - by) + sum;
    top = next;
  }
  __device__ void reduce(T* shared) {
    const T all = row_reduce(top, Larger(), shared);
    total = row_reduce(total * exp_of(top - shift(all)), Plus(), shared);
    top = all;
  }
};

}  // namespace vt::cuda
