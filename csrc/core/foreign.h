// A function from outside of this project that works on tensors: a host callable, or one that
// launches kernels on the current stream. It is an argument of the op _foreign.
#pragma once

#include "core/ref.h"
#include "core/tensor.h"

namespace vt {

class ForeignFunction : public RefCounted {
 public:
  /// Calls it on the calling thread. It may change the elements of `writes` only, and keeps none of
  /// the tensors: in a captured step their memory is somebody else's afterwards.
  virtual void call(TensorSpan writes, TensorSpan reads) const = 0;
};

}  // namespace vt
