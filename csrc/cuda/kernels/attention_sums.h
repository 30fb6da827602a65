// Sums over batch and rows of the gradients of query, key and value, such as the gradient of the
// bias of the layer that these come from.
#pragma once

#include "core/tensor.h"

namespace vt::cuda::attention {

/// Where the sums go, heads * width each; undefined: not wanted.
struct GradientSums {
  Tensor query, key, value;

  bool wanted() const { return query.defined() || key.defined() || value.defined(); }
};

}  // namespace vt::cuda::attention
