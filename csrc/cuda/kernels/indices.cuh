// Index tensors on the device. An index out of range cannot become an exception without waiting
// for the device, so it stops the kernel, as an assertion does; later calls tell of it.
#pragma once

#include "core/extents.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/failure.cuh"

namespace vt::cuda {

/// Dense indices of 32 or 64 bits, each checked to lie in [0, length).
struct Indices {
  const void* data;
  bool narrow;
  FailedCheck op;  // what a bad one is reported as
  FailureSlot* failure;
  int64_t length;

  __device__ int64_t operator()(int64_t i) const {
    const int64_t index = narrow ? int64_t{static_cast<const int32_t*>(data)[i]}
                                 : static_cast<const int64_t*>(data)[i];
    if (index < 0 || index >= length) stop_kernel(failure, op, index, length);
    return index;
  }
};

/// `index` dense and of 32 or 64 bits.
inline Tensor dense_index(const Tensor& index) {
  if (index.dtype() == DType::Int32 || index.dtype() == DType::Int64) return contiguous(index);
  const Tensor out = empty(index.sizes(), DType::Int64, index.device());
  copy(out, index, true);
  return out;
}
/// Of a dense_index, which must outlive the launches that use it.
inline Indices indices_of(const Tensor& dense, FailedCheck op, int64_t length) {
  return {dense.data(), dense.dtype() == DType::Int32, op, failure_slot(dense.device().index),
          length};
}

}  // namespace vt::cuda
