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

}  // namespace vt
