// Elements of a floating dtype that the kernel finds out, for kernels whose operands are of several.
#pragma once

#include "cuda/kernels/rows.cuh"

namespace vt::cuda {

/// Dense elements of a dtype that the kernel finds out; may be absent.
struct Elements {
  char* data = nullptr;
  DType dtype = DType::Float32;

  Elements() = default;
  explicit Elements(const Tensor& t) {
    if (!t.defined()) return;
    data = static_cast<char*>(t.data());
    dtype = t.dtype();
  }
  __device__ int64_t bytes() const {
    return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
  }
  /// W elements from i on; more than one only with T = float, and i a multiple of W.
  template <int W, class T>
  __device__ void load(int64_t i, T (&values)[W]) const {
    if constexpr (W == 1) {
      values[0] = load_as<T>(data + i * bytes(), dtype);
    } else if (dtype == DType::BFloat16) {
      load_piece<__nv_bfloat16, T, W>(reinterpret_cast<const __nv_bfloat16*>(data) + i, values);
    } else if (dtype == DType::Float16) {
      load_piece<__half, T, W>(reinterpret_cast<const __half*>(data) + i, values);
    } else {
      load_piece<float, T, W>(reinterpret_cast<const float*>(data) + i, values);
    }
  }
  /// The same, or W times `otherwise` where there is nothing.
  template <int W, class T>
  __device__ void load_or(int64_t i, T (&values)[W], T otherwise) const {
    if (data) return load<W>(i, values);
#pragma unroll
    for (int k = 0; k < W; ++k) values[k] = otherwise;
  }
  template <int W, class T>
  __device__ void store(int64_t i, const T (&values)[W]) const {
    if constexpr (W == 1) {
      store_as(data + i * bytes(), dtype, values[0]);
    } else if (dtype == DType::BFloat16) {
      store_piece<__nv_bfloat16, T, W>(reinterpret_cast<__nv_bfloat16*>(data) + i, values);
    } else if (dtype == DType::Float16) {
      store_piece<__half, T, W>(reinterpret_cast<__half*>(data) + i, values);
    } else {
      store_piece<float, T, W>(reinterpret_cast<float*>(data) + i, values);
    }
  }
  /// What the values are once they have been stored.
  template <int W, class T>
  __device__ void round(T (&values)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (dtype == DType::BFloat16) values[k] = convert<T>(convert<__nv_bfloat16>(values[k]));
      if (dtype == DType::Float16) values[k] = convert<T>(convert<__half>(values[k]));
      if (dtype == DType::Float32) values[k] = static_cast<T>(static_cast<float>(values[k]));
    }
  }
};

}  // namespace vt::cuda
