// Sees .grad fields, and what else belongs to a tensor besides its values, before they change, so
// that what is undone can put them back.
#pragma once

#include "core/tensor.h"

namespace vt::autograd {

class GradientObserver {
 public:
  virtual ~GradientObserver() = default;
  /// The tensor's .grad, now `before` (maybe undefined), is about to be replaced or added to.
  virtual void gradient_changes(const Tensor& tensor, const Tensor& before) = 0;
  /// The tensor is about to mean other memory, or to get another history or leaf flag.
  virtual void tensor_changes(const Tensor& tensor) = 0;
};

/// Of this thread; null where nobody looks.
GradientObserver* gradient_observer();
void set_gradient_observer(GradientObserver* observer);

/// Call before such a change.
inline void note_tensor_changes(const Tensor& tensor) {
  if (GradientObserver* observer = gradient_observer()) [[unlikely]]
    observer->tensor_changes(tensor);
}

}  // namespace vt::autograd
