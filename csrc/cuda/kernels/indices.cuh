// Index tensors on the device. An index out of range cannot become an exception without waiting
// for the device, so it stops the kernel with a message, as an assertion does.
#pragma once

#include <cstdio>

#include "core/tensor.h"
#include "cuda/kernels/copy.cuh"

namespace vt::cuda {

/// The op an index belongs to, for messages: kernels cannot print host strings.
enum class IndexedOp : int {
  Index,
  IndexSelect,
  IndexAdd,
  IndexCopy,
  Gather,
  Scatter,
  ScatterAdd,
  ScatterReduce,
  Embedding
};

__device__ inline const char* name_of(IndexedOp op) {
  switch (op) {
    case IndexedOp::Index:
      return "index";
    case IndexedOp::IndexSelect:
      return "index_select";
    case IndexedOp::IndexAdd:
      return "index_add_";
    case IndexedOp::IndexCopy:
      return "index_copy_";
    case IndexedOp::Gather:
      return "gather";
    case IndexedOp::Scatter:
      return "scatter_";
    case IndexedOp::ScatterAdd:
      return "scatter_add_";
    case IndexedOp::ScatterReduce:
      return "scatter_reduce";
    default:
      return "embedding";
  }
}

__device__ __noinline__ inline void index_out_of_range(IndexedOp op, int64_t index,
                                                       int64_t length) {
  printf("%s: index %lld is out of bounds for a dimension of size %lld\n", name_of(op),
         static_cast<long long>(index), static_cast<long long>(length));
  __trap();
}

/// Dense indices of 32 or 64 bits, each checked to lie in [0, length).
struct Indices {
  const void* data;
  bool narrow;
  IndexedOp op;
  int64_t length;

  __device__ int64_t operator()(int64_t i) const {
    const int64_t index = narrow ? int64_t{static_cast<const int32_t*>(data)[i]}
                                 : static_cast<const int64_t*>(data)[i];
    if (index < 0 || index >= length) index_out_of_range(op, index, length);
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
inline Indices indices_of(const Tensor& dense, IndexedOp op, int64_t length) {
  return {dense.data(), dense.dtype() == DType::Int32, op, length};
}

struct Extents {
  int64_t outer = 1, length = 1, inner = 1;
};
inline Extents extents_of(IntSpan sizes, int64_t dim) {
  Extents e;
  if (sizes.empty()) return e;
  const int64_t d = wrap_dim(dim, static_cast<int64_t>(sizes.size()));
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i)
    (i < d ? e.outer : i == d ? e.length : e.inner) *= sizes[i];
  return e;
}

}  // namespace vt::cuda
