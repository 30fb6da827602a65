// What other kernels need of copies.
#pragma once

#include "core/tensor.h"

namespace vt::cuda {

/// self = source, broadcast and converted; either end may be on the host.
void copy(const Tensor& self, const Tensor& source, bool non_blocking);

/// `t` itself if it is contiguous, else a contiguous copy.
inline Tensor contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const Tensor out = empty(t.sizes(), t.dtype(), t.device());
  copy(out, t, true);
  return out;
}

}  // namespace vt::cuda
