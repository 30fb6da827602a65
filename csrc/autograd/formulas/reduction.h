// Backward formulas of reductions, scans, sorting and joining.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "autograd/tensor_meta.h"
#include "core/tensor.h"

namespace vt::autograd {

/// The gradient of a reduction spread back over the reduced dimensions (a view).
Tensor reduction_expand(const Tensor& grad, IntSpan sizes, std::optional<IntSpan> dim,
                        bool keepdim);
/// Elements that were reduced into one.
int64_t reduced_count(IntSpan sizes, std::optional<IntSpan> dim);
Tensor prod_backward(const Tensor& grad, const Tensor& self);
Tensor prod_dim_backward(const Tensor& grad, const Tensor& self, int64_t dim, bool keepdim);
Tensor amax_backward(const Tensor& grad, const Tensor& self, const Tensor& result, IntSpan dim,
                     bool keepdim);
Tensor select_index_backward(const Tensor& grad, IntSpan sizes, int64_t dim, const Tensor& indices,
                             bool keepdim);
Tensor cumprod_backward(const Tensor& grad, const Tensor& self, int64_t dim);
Tensor sort_backward(const Tensor& grad, const Tensor& indices, IntSpan sizes, int64_t dim);
Tensor scatter_backward_self(const Tensor& grad, int64_t dim, const Tensor& index);
/// Gradients of `self` and `src`; equal extremes share, products are right where some are zero.
std::tuple<Tensor, Tensor> scatter_reduce_backward(const Tensor& grad, const Tensor& self,
                                                   int64_t dim, const Tensor& index,
                                                   const Tensor& src, std::string_view reduce,
                                                   bool include_self, const Tensor& result);
std::vector<Tensor> cat_backward(const Tensor& grad, const std::vector<TensorMeta>& tensors,
                                 int64_t dim);

}  // namespace vt::autograd
