// Elements: storage types and how they become compute types. 16-bit floats are widened to float,
// computed, and rounded once on store, as on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/error.h"
#include "core/scalar.h"

namespace vt::cuda {

/// The type kernels compute in for a storage type.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<__half> {
  using type = float;
};
template <>
struct ComputeOf<__nv_bfloat16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// A conversion follows C++ for numbers; floats to integers truncate, NaN and out-of-range values
// give what the hardware's saturating conversion gives; anything to bool is "!= 0".
template <class To, class From>
__host__ __device__ inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (std::is_same_v<From, __half>)
    return convert<To>(__half2float(x));
  else if constexpr (std::is_same_v<From, __nv_bfloat16>)
    return convert<To>(__bfloat162float(x));
  else if constexpr (std::is_same_v<To, bool>)
    return x != From(0);
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_integral_v<To> && sizeof(To) < 4 && std::is_floating_point_v<From>)
    return static_cast<To>(static_cast<int64_t>(x));  // wraps, as narrowing an integer does
  else
    return static_cast<To>(x);
}

/// Reads an element of `dtype` as T.
template <class T>
__device__ inline T load_as(const char* p, DType dtype) {
  switch (dtype) {
    case DType::Bool:
      return convert<T>(*reinterpret_cast<const uint8_t*>(p) != 0);
    case DType::UInt8:
      return convert<T>(*reinterpret_cast<const uint8_t*>(p));
    case DType::Int8:
      return convert<T>(*reinterpret_cast<const int8_t*>(p));
    case DType::Int16:
      return convert<T>(*reinterpret_cast<const int16_t*>(p));
    case DType::Int32:
      return convert<T>(*reinterpret_cast<const int32_t*>(p));
    case DType::Int64:
      return convert<T>(*reinterpret_cast<const int64_t*>(p));
    case DType::Float16:
      return convert<T>(*reinterpret_cast<const __half*>(p));
    case DType::BFloat16:
      return convert<T>(*reinterpret_cast<const __nv_bfloat16*>(p));
    case DType::Float32:
      return convert<T>(*reinterpret_cast<const float*>(p));
    case DType::Float64:
      return convert<T>(*reinterpret_cast<const double*>(p));
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      break;  // only float8.cu knows them
  }
  return T();
}

/// Writes T as an element of `dtype`.
template <class T>
__device__ inline void store_as(char* p, DType dtype, T value) {
  switch (dtype) {
    case DType::Bool:
      *reinterpret_cast<bool*>(p) = convert<bool>(value);
      break;
    case DType::UInt8:
      *reinterpret_cast<uint8_t*>(p) = convert<uint8_t>(value);
      break;
    case DType::Int8:
      *reinterpret_cast<int8_t*>(p) = convert<int8_t>(value);
      break;
    case DType::Int16:
      *reinterpret_cast<int16_t*>(p) = convert<int16_t>(value);
      break;
    case DType::Int32:
      *reinterpret_cast<int32_t*>(p) = convert<int32_t>(value);
      break;
    case DType::Int64:
      *reinterpret_cast<int64_t*>(p) = convert<int64_t>(value);
      break;
    case DType::Float16:
      *reinterpret_cast<__half*>(p) = convert<__half>(value);
      break;
    case DType::BFloat16:
      *reinterpret_cast<__nv_bfloat16*>(p) = convert<__nv_bfloat16>(value);
      break;
    case DType::Float32:
      *reinterpret_cast<float*>(p) = convert<float>(value);
      break;
    case DType::Float64:
      *reinterpret_cast<double*>(p) = convert<double>(value);
      break;
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      break;  // only float8.cu knows them
  }
}

/// A value as `dtype` holds it, where T is wider: floats round to 16-bit floats, integers wrap to
/// narrow ones. Other dtypes leave it alone.
template <class T>
__device__ inline T round_to(T value, DType dtype) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::Float16) return __half2float(__float2half_rn(value));
    if (dtype == DType::BFloat16) return __bfloat162float(__float2bfloat16_rn(value));
  } else if constexpr (std::is_same_v<T, int64_t>) {
    if (dtype == DType::UInt8) return static_cast<uint8_t>(value);
    if (dtype == DType::Int8) return static_cast<int8_t>(value);
    if (dtype == DType::Int16) return static_cast<int16_t>(value);
    if (dtype == DType::Int32) return static_cast<int32_t>(value);
  }
  return value;
}

/// A number of the host as a kernel that computes `dtype` in T sees it.
template <class T>
T scalar_as(const Scalar& number, DType dtype) {
  if constexpr (std::is_same_v<T, float>) {
    const auto x = static_cast<float>(number.to_double());
    return dtype == DType::Float16    ? to_float(to_half(x))
           : dtype == DType::BFloat16 ? to_float(to_bfloat16(x))
                                      : x;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    const int64_t x = number.to_int();
    return dtype == DType::UInt8   ? static_cast<uint8_t>(x)
           : dtype == DType::Int8  ? static_cast<int8_t>(x)
           : dtype == DType::Int16 ? static_cast<int16_t>(x)
           : dtype == DType::Int32 ? static_cast<int32_t>(x)
                                   : x;
  } else {
    return number.to<T>();
  }
}

/// N elements that move as one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

/// Calls `f.template operator()<S>()` with the storage type of a floating dtype.
template <class F>
decltype(auto) visit_float_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Float16:
      return f.template operator()<__half>();
    case DType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    case DType::Float32:
      return f.template operator()<float>();
    case DType::Float64:
      return f.template operator()<double>();
    default:
      fail(ErrorKind::NotImplemented, "not implemented for '", dtype, "'");
  }
}
/// The same for every dtype.
template <class F>
decltype(auto) visit_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Bool:
      return f.template operator()<bool>();
    case DType::UInt8:
      return f.template operator()<uint8_t>();
    case DType::Int8:
      return f.template operator()<int8_t>();
    case DType::Int16:
      return f.template operator()<int16_t>();
    case DType::Int32:
      return f.template operator()<int32_t>();
    case DType::Int64:
      return f.template operator()<int64_t>();
    default:
      return visit_float_storage(dtype, f);
  }
}
/// An unsigned type of the same width: for kernels that only move elements.
template <class F>
decltype(auto) visit_width(int64_t itemsize, F&& f) {
  switch (itemsize) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    default:
      return f.template operator()<uint64_t>();
  }
}

}  // namespace vt::cuda
