// Operands on another device than the tensor they go with.
#pragma once

#include "vt/ops.h"

namespace vt::composite {

/// `t`, or a copy of it on `device`.
inline Tensor moved_to(const Tensor& t, Device device) {
  if (t.device() == device) return t;
  return ops::copy_(vt::empty(t.sizes(), t.dtype(), device), t, false);
}

/// A number in host memory, as a 0-d tensor on `device`, without waiting for the device. Other
/// tensors are given back as they are: an op that cannot take them says so.
inline Tensor number_on(const Tensor& t, Device device) {
  if (t.device() == device || t.dim() != 0 || !t.device().is_cpu()) return t;
  return ops::fill_(vt::empty({}, t.dtype(), device), t);
}

}  // namespace vt::composite
