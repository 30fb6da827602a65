#include "autograd/formulas/conv.h"

#include "vt/ops.h"

namespace vt::autograd {

Tensor max_pool2d_gather(const Tensor& grad, const Tensor& indices) {
  const Tensor picked =
      ops::gather(ops::flatten(grad, -2, -1), -1, ops::flatten(indices, -2, -1), false);
  return ops::view(picked, indices.sizes());
}

}  // namespace vt::autograd
