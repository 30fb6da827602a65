#include "vt/meta_decls.h"

namespace vt::meta {

/// A 0-d result in the first tensor's dtype.
Tensor _multi_tensor_norm(TensorSpan tensors, double) {
  if (tensors.empty()) return empty(Dims{}, default_dtype());
  for (const Tensor& t : tensors) {
    check(is_floating(t.dtype()), "_multi_tensor_norm: expected floating tensors, got ", t.dtype());
  }
  return empty(Dims{}, tensors[0].dtype(), tensors[0].device());
}

}  // namespace vt::meta
