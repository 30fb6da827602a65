// What other kernels need of copies.
#pragma once

#include "core/tensor.h"
#include "core/tensor_iterator.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// self = source, broadcast and converted; either end may be on the host.
void copy(const Tensor& self, const Tensor& source, bool non_blocking);

/// Operand 0 = operand 1, converted (to_dtype.cu).
void convert_elements(TensorIterator& it);

/// The same for tensors of one shape on one device of which one is of 8-bit floats (float8.cu).
void convert_float8(const Tensor& to, const Tensor& from);

/// Operand 0 = operand 1, of one dtype: bytes move, in tiles where one is a transpose of the other
/// (move.cu).
void move_elements(const Launch& launch, const TensorIterator& it);

/// `t` itself if it is contiguous, else a contiguous copy.
inline Tensor contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const Tensor out = empty(t.sizes(), t.dtype(), t.device());
  copy(out, t, true);
  return out;
}

}  // namespace vt::cuda
