// The norm of all elements of all tensors, a 0-d tensor: blocks sum their chunks in double into
// scratch memory, one block adds those sums in order. No number leaves the device.
#include <cmath>

#include "cuda/kernels/multi_tensor.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

enum class Order { Zero, One, Two, Infinite, Other };

Order order_of(double p) {
  if (std::isinf(p)) return Order::Infinite;
  return p == 0 ? Order::Zero : p == 1 ? Order::One : p == 2 ? Order::Two : Order::Other;
}

/// Adds up terms, or keeps the largest; a NaN stays.
struct Gather {
  Order order;
  __device__ double operator()(double a, double b) const {
    if (order != Order::Infinite) return a + b;
    return a > b || a != a ? a : b;
  }
};

template <class T>
__device__ inline double term(T x, Order order, double p) {
  const double a = fabs(static_cast<double>(x));
  switch (order) {
    case Order::Two:
      return a * a;
    case Order::Zero:
      return a != 0 ? 1.0 : 0.0;
    case Order::Other:
      return pow(a, p);
    default:
      return a;
  }
}

/// The squares' sum of a thread's part of a whole chunk, all of whose loads are in flight at once.
template <class S>
__device__ inline double whole_chunk(const char* data, int64_t begin) {
  constexpr int kPieces = kChunkElements / (kMultiThreads * 4);
  const S* x = reinterpret_cast<const S*>(data) + begin + threadIdx.x * 4;
  float value[kPieces][4];
#pragma unroll
  for (int c = 0; c < kPieces; ++c) load_piece(x + c * kMultiThreads * 4, value[c]);
  double total = 0;
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) total += term(value[c][k], Order::Two, 2);
  }
  return total;
}

/// S: double; float also for tensors in 16 bits, which gives the same sums; or AnyStorage.
template <class T, class S>
__global__ void __launch_bounds__(kMultiThreads)
    chunk_norms(const __grid_constant__ TensorTable<1> table, double* sums, Order order, double p) {
  __shared__ double shared[kMultiThreads / kWarp];
  const int k = table.find(static_cast<int>(blockIdx.x));
  const int64_t begin = (blockIdx.x - table.first_block[k]) * kChunkElements;
  const int64_t n =
      table.numel[k] - begin < kChunkElements ? table.numel[k] - begin : kChunkElements;
  const Gather gather{order};
  double total = 0;
  if constexpr (std::is_same_v<S, float>) {
    const DType dtype = table.dtype[0][k];
    const char* x = table.data[0][k];
    const int64_t body = table.aligned[k] ? n / 4 * 4 : 0;
    if (order == Order::Two && body == kChunkElements) {
      total = dtype == DType::Float32    ? whole_chunk<float>(x, begin)
              : dtype == DType::BFloat16 ? whole_chunk<__nv_bfloat16>(x, begin)
                                         : whole_chunk<__half>(x, begin);
    } else {
      for (int64_t i = threadIdx.x * 4; i < body; i += kMultiThreads * 4) {
        float value[4];
        detail::load_list<float>(x, dtype, true, begin + i, value);
#pragma unroll
        for (int c = 0; c < 4; ++c) total = gather(total, term(value[c], order, p));
      }
      for (int64_t i = body + threadIdx.x; i < n; i += kMultiThreads) {
        float value[1];
        detail::load_list<float>(x, dtype, true, begin + i, value);
        total = gather(total, term(value[0], order, p));
      }
    }
  } else if constexpr (std::is_same_v<S, double>) {
    const double* x = reinterpret_cast<const double*>(table.data[0][k]) + begin;
    for (int64_t i = threadIdx.x; i < n; i += kMultiThreads)
      total = gather(total, term(x[i], order, p));
  } else {
    const DType dtype = table.dtype[0][k];
    const char* x = table.data[0][k] + begin * detail::item_bytes(dtype);
    for (int64_t i = threadIdx.x; i < n; i += kMultiThreads)
      total = gather(total, term(load_as<T>(x + i * detail::item_bytes(dtype), dtype), order, p));
  }
  total = row_reduce(total, gather, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// What gradients of the norm are multiplied by; `out` is null where nobody asks.
struct Clip {
  char* out = nullptr;
  Number max_norm, eps, limit;

  /// With every step rounded to T.
  template <class T>
  __device__ void store(DType dtype, double norm) const {
    const T divisor = static_cast<T>(norm) + static_cast<T>(eps.get());
    const T quotient = static_cast<T>(max_norm.get()) / divisor, most = static_cast<T>(limit.get());
    store_as(out, dtype, quotient > most ? most : quotient);
  }
};

constexpr int kTotalThreads = 1024;

__global__ void __launch_bounds__(kTotalThreads)
    total_norm(char* out, DType dtype, const double* sums, int64_t n, Order order, double p,
               const Clip clip) {
  __shared__ double shared[kTotalThreads / kWarp];
  const Gather gather{order};
  double total = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += kTotalThreads) total = gather(total, sums[i]);
  total = row_reduce(total, gather, shared);
  if (threadIdx.x != 0) return;
  if (order == Order::Two) total = sqrt(total);
  if (order == Order::Other) total = pow(total, 1 / p);
  store_as(out, dtype, total);
  if (!clip.out) return;
  if (dtype == DType::Float64)
    clip.store<double>(dtype, total);
  else
    clip.store<float>(dtype, load_as<float>(out, dtype));
}

void norm(const Tensor& out, TensorSpan tensors, double p, const Clip& clip) {
  using detail::AnyStorage;
  const Launch launch(out.device());
  const DenseLists<1> list({tensors}, 0);
  const Order order = order_of(p);
  int64_t parts = 0;
  for (const Tensor& t : tensors) parts += ceil_div(t.numel(), kChunkElements);
  const Scratch sums(static_cast<size_t>(parts + 1) * sizeof(double), launch);
  double* next = sums.data<double>();
  for_each_table(list, nullptr, 1, [&](Stored kind, const TensorTable<1>& table, int32_t blocks) {
    const auto kernel = kind == Stored::Float    ? chunk_norms<float, float>
                        : kind == Stored::Double ? chunk_norms<double, double>
                                                 : chunk_norms<float, AnyStorage>;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMultiThreads), 0, table, next, order,
           p);
    next += blocks;
  });
  launch(total_norm, dim3(1), dim3(kTotalThreads), 0, static_cast<char*>(out.data()), out.dtype(),
         sums.data<double>(), parts, order, p, clip);
}

void multi_tensor_norm(const Tensor& out, TensorSpan tensors, double p) {
  norm(out, tensors, p, {});
}
void clip_coefficient(const Tensor& out, const Tensor& coefficient, TensorSpan tensors, double p,
                      const Tensor& max_norm, const Tensor& eps, const Tensor& limit, DType) {
  norm(out, tensors, p,
       {static_cast<char*>(coefficient.data()), Number(max_norm), Number(eps), Number(limit)});
}

const RegisterCuda registered([](KernelTable& t) {
  t._multi_tensor_norm = multi_tensor_norm;
  t._clip_coefficient = clip_coefficient;
});

}  // namespace
}  // namespace vt::cuda
