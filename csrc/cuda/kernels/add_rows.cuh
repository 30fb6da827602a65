// Sums of rows that share a target, in a fixed order: the heart of index_add_, scatter_add_ and the
// gradient of embedding.
#pragma once

#include <limits>

#include "core/tensor.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// Positions of an index sorted by value; equal ones stay in order.
struct SortedIndex {
  const void* keys;
  const uint32_t* positions;
  bool wide;  // keys of 64 bits
  int64_t n;

  __device__ int64_t key(int64_t i) const {
    return wide ? static_cast<int64_t>(static_cast<const uint64_t*>(keys)[i])
                : int64_t{static_cast<const uint32_t*>(keys)[i]};
  }
};

/// target[o, key, :] = base + scale * sum of source[o, position, :] over the key's positions, with
/// base = the target's own value or nothing. Both are dense.
struct RowSums {
  SortedIndex index;
  const char* source;
  char* target;
  DType dtype;
  int size;  // of an element
  int64_t outer, length, inner;
  int64_t skip;          // a key whose rows are left alone, or negative
  bool accumulate;       // onto the target's value
  bool divide_by_count;  // the mean of a key's rows
};

/// `scale` applies to sums in float, double or int64, whichever the dtype computes in.
void add_rows(const Launch& launch, const RowSums& sums, const Scalar& scale);

}  // namespace vt::cuda
