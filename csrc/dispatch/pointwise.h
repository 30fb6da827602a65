// Pointwise kernels apart from the front of their op, for kernels that run several of them over one
// range of elements.
#pragma once

#include <optional>
#include <span>

#include "core/scalar.h"
#include "core/tensor_iterator.h"
#include "vt/op_ids.h"

namespace vt {

/// A kernel of the kind `pointwise` on an iterator that is built. `attributes` are the arguments
/// that are no tensors, in their order; a string is a number (ShortString).
using PointwiseKernel = void (*)(TensorIterator& it, std::span<const Scalar> attributes);
/// Null for ops of another kind. In-place forms have their op's kernel. Generated.
PointwiseKernel pointwise_kernel(OpId id);
/// How the compute dtype follows from the inputs; nothing for ops of another kind. Generated.
std::optional<Promote> op_promotion(OpId id);

/// A string of 8 characters at most as a number: its bytes, the first one lowest.
class ShortString {
 public:
  explicit ShortString(int64_t bytes) {
    for (char& c : text_) {
      c = static_cast<char>(bytes & 0xff);
      bytes = static_cast<int64_t>(static_cast<uint64_t>(bytes) >> 8);
      length_ += c != '\0';
    }
  }
  std::string_view view() const { return {text_, length_}; }

 private:
  char text_[8];
  size_t length_ = 0;
};

}  // namespace vt
