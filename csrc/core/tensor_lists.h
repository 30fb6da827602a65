// What the ops of many tensors at once, the optimizers' above all, ask of their lists.
#pragma once

#include <initializer_list>
#include <string_view>

#include "core/error.h"
#include "core/tensor.h"

namespace vt {

/// Lists are as long as the first, of `n` tensors, or empty.
inline void check_lists(std::string_view op, size_t n, std::initializer_list<TensorSpan> lists) {
  for (const TensorSpan list : lists) {
    check(list.size() == n || list.empty(), op,
          ": lists of tensors must have the same length, got ", n, " and ", list.size());
  }
}

/// What is rounded at random is bfloat16, and so is what it is made from.
inline void check_bfloat16(std::string_view op, std::initializer_list<TensorSpan> lists) {
  for (const TensorSpan list : lists) {
    for (const Tensor& t : list) {
      check(t.dtype() == DType::BFloat16, op,
            ": parameters, gradients and moments are all bfloat16, but one of shape ", t.sizes(),
            " is ", t.dtype());
    }
  }
}

/// What _add_parts_ takes: for each of `self` a matrix of as many columns as that has elements.
inline void check_parts(TensorSpan self, TensorSpan parts) {
  check(self.size() == parts.size(),
        "_add_parts_: lists of tensors must have the same length, got ", self.size(), " and ",
        parts.size());
  for (size_t i = 0; i < self.size(); ++i) {
    const Tensor &to = self[i], &from = parts[i];
    check(from.dim() == 2 && from.sizes()[1] == to.numel(), "_add_parts_: expected rows of ",
          to.numel(), " elements for a tensor of shape ", to.sizes(), ", got shape ", from.sizes());
    check(from.dtype() == DType::Float32 || from.dtype() == DType::Float64,
          "_add_parts_: expected parts in float32 or float64, got ", from.dtype());
    check(is_floating(to.dtype()) && to.itemsize() > 1,
          "_add_parts_: expected a tensor of floats of "
          "16 bits or more, got ",
          to.dtype());
    check(to.is_contiguous() && from.is_contiguous(),
          "_add_parts_: expected contiguous tensors, got strides ", to.strides(), " and ",
          from.strides(), "; call .contiguous() first");
  }
}

}  // namespace vt
