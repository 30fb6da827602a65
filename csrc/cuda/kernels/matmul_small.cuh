// Products of small floating matrices by a kernel of our own: a launch costs a third of what a
// library call does, and the library has no better use for so few blocks.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// out = alpha * a @ b + beta * c + bias for each matrix of a batch. Strides in elements, any of
/// them (0 broadcasts), but out's columns are dense. `c` may be `out`; it is not read where beta
/// is 0. `bias` has n dense elements, or is null.
struct SmallProduct {
  const void* a = nullptr;
  const void* b = nullptr;
  const void* c = nullptr;
  const void* bias = nullptr;
  void* out = nullptr;
  int64_t batch = 1, m = 0, n = 0, k = 0;
  int64_t a_row = 0, a_column = 0, a_step = 0;
  int64_t b_row = 0, b_column = 0, b_step = 0;
  int64_t c_row = 0, c_column = 0, c_step = 0;
  int64_t out_row = 0, out_step = 0;
  double alpha = 1, beta = 0;
};

/// Whether small_product is the faster way for these sizes (a floating dtype).
bool is_small_product(DType dtype, int64_t batch, int64_t m, int64_t n, int64_t k);

/// 16-bit floats accumulate in float and round once; float32 is never rounded to TF32. Each element
/// is summed in one order, so results do not vary.
void small_product(const Launch& launch, DType dtype, const SmallProduct& product);

}  // namespace vt::cuda
