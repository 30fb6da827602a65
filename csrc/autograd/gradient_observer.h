// Sees .grad fields before they change, so that what is undone can put them back.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

class GradientObserver {
 public:
  virtual ~GradientObserver() = default;
  /// The tensor's .grad, now `before` (maybe undefined), is about to be replaced or added to.
  virtual void gradient_changes(const Tensor& tensor, const Tensor& before) = 0;
};

/// Of this thread; null where nobody looks.
GradientObserver* gradient_observer();
void set_gradient_observer(GradientObserver* observer);

}  // namespace vt::autograd
