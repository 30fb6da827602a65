#include "autograd/formulas/reduction.h"

#include "vt/ops.h"

namespace vt::autograd {
namespace {

uint64_t mask_of(std::optional<IntSpan> dim, int64_t ndim) {
  if (!dim || dim->empty()) return ~uint64_t{0};
  uint64_t mask = 0;
  for (const int64_t d : *dim) mask |= uint64_t{1} << wrap_dim(d, ndim);
  return mask;
}

Tensor restore_dims(const Tensor& grad, IntSpan sizes, uint64_t mask, bool keepdim) {
  if (keepdim || sizes.empty()) return grad;
  Dims shape;
  for (size_t d = 0; d < sizes.size(); ++d) shape.push_back(mask >> d & 1 ? 1 : sizes[d]);
  return ops::reshape(grad, shape);
}

/// Product of all other elements along the last dimension, right where some are zero.
Tensor product_of_others(const Tensor& x) {
  const Tensor one =
      ops::ones_like(ops::slice(x, -1, 0, 1, 1), std::nullopt, std::nullopt, std::nullopt);
  const int64_t n = x.size(-1);
  const Tensor before_parts[] = {one, ops::slice(x, -1, 0, n - 1, 1)};
  const Tensor after_parts[] = {one, ops::slice(ops::flip(x, Dims{-1}), -1, 0, n - 1, 1)};
  const Tensor before = ops::cumprod(ops::cat(before_parts, -1), -1, std::nullopt);
  const Tensor after =
      ops::flip(ops::cumprod(ops::cat(after_parts, -1), -1, std::nullopt), Dims{-1});
  return ops::mul(before, after);
}

}  // namespace

Tensor reduction_expand(const Tensor& grad, IntSpan sizes, std::optional<IntSpan> dim,
                        bool keepdim) {
  const uint64_t mask = mask_of(dim, static_cast<int64_t>(sizes.size()));
  return ops::expand(restore_dims(grad, sizes, mask, keepdim), sizes, false);
}

int64_t reduced_count(IntSpan sizes, std::optional<IntSpan> dim) {
  const uint64_t mask = mask_of(dim, static_cast<int64_t>(sizes.size()));
  int64_t count = 1;
  for (size_t d = 0; d < sizes.size(); ++d) count *= mask >> d & 1 ? sizes[d] : 1;
  return count;
}

Tensor prod_backward(const Tensor& grad, const Tensor& self) {
  if (self.dim() == 0) return grad;
  if (self.numel() == 0) return ops::zeros_like(self, std::nullopt, std::nullopt, std::nullopt);
  const Tensor others = product_of_others(ops::reshape(self, Dims{-1}));
  return ops::mul(grad, ops::reshape(others, self.sizes()));
}

Tensor prod_dim_backward(const Tensor& grad, const Tensor& self, int64_t dim, bool keepdim) {
  if (self.dim() == 0) return grad;
  if (self.numel() == 0) return ops::zeros_like(self, std::nullopt, std::nullopt, std::nullopt);
  const Tensor last = ops::transpose(self, dim, -1);
  const Tensor others = ops::transpose(product_of_others(last), dim, -1);
  return ops::mul(
      restore_dims(grad, self.sizes(), uint64_t{1} << wrap_dim(dim, self.dim()), keepdim), others);
}

Tensor amax_backward(const Tensor& grad, const Tensor& self, const Tensor& result, IntSpan dim,
                     bool keepdim) {
  const uint64_t mask = mask_of(dim, self.dim());
  const Tensor best = restore_dims(result, self.sizes(), mask, keepdim);
  const Tensor ties = ops::_to_dtype(ops::eq(self, best), grad.dtype());
  Dims all;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (mask >> d & 1) all.push_back(d);
  }
  const Tensor count =
      self.dim() == 0 ? ties : ops::sum_dim(ties, IntSpan(all), true, std::nullopt);
  return ops::div(ops::mul(ties, restore_dims(grad, self.sizes(), mask, keepdim)), count);
}

Tensor select_index_backward(const Tensor& grad, IntSpan sizes, int64_t dim, const Tensor& indices,
                             bool keepdim) {
  if (!grad.defined()) return {};
  if (sizes.empty()) return grad;
  const Tensor g =
      keepdim ? grad : ops::unsqueeze(grad, wrap_dim(dim, static_cast<int64_t>(sizes.size())));
  const Tensor at =
      keepdim ? indices
              : ops::unsqueeze(indices, wrap_dim(dim, static_cast<int64_t>(sizes.size())));
  return ops::scatter_add(ops::zeros(sizes, grad.dtype(), grad.device()), dim, at, g);
}

Tensor cumprod_backward(const Tensor& grad, const Tensor& self, int64_t dim) {
  if (self.dim() == 0) return grad;
  if (self.numel() == 0) return ops::zeros_like(self, std::nullopt, std::nullopt, std::nullopt);
  // d out[j] / d x[i] = product of x[k] for k <= j, k != i. Along the dimension this is a
  // triangular matrix per lane: exact where elements are zero, and made of differentiable ops.
  const Tensor x = ops::transpose(self, dim, -1);
  const Tensor g = ops::transpose(grad, dim, -1);
  const int64_t n = x.size(-1);
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < n; ++i) {
    const Tensor skipped = ops::select_scatter(
        x, ops::ones_like(ops::select(x, -1, i), std::nullopt, std::nullopt, std::nullopt), -1, i);
    const Tensor partial = ops::slice(ops::cumprod(skipped, -1, std::nullopt), -1, i, n, 1);
    parts.push_back(ops::sum_dim(ops::mul(partial, ops::slice(g, -1, i, n, 1)), IntSpan(Dims{-1}),
                                 false, std::nullopt));
  }
  return ops::transpose(ops::stack(parts, -1), dim, -1);
}

Tensor sort_backward(const Tensor& grad, const Tensor& indices, IntSpan sizes, int64_t dim) {
  if (!grad.defined()) return {};
  if (sizes.empty()) return grad;
  return ops::scatter_add(ops::zeros(sizes, grad.dtype(), grad.device()), dim, indices, grad);
}

Tensor scatter_backward_self(const Tensor& grad, int64_t dim, const Tensor& index) {
  return ops::scatter_value(grad, dim, index, wrapped_scalar(Scalar(0)));
}

std::vector<Tensor> cat_backward(const Tensor& grad, const std::vector<TensorMeta>& tensors,
                                 int64_t dim) {
  std::vector<Tensor> out;
  int64_t start = 0;
  for (const TensorMeta& t : tensors) {
    if (t.dim() == 1 && t.numel() == 0) {
      out.push_back(ops::zeros(t.sizes(), grad.dtype(), grad.device()));
      continue;
    }
    const int64_t length = t.size(wrap_dim(dim, grad.dim()));
    out.push_back(ops::slice(grad, dim, start, start + length, 1));
    start += length;
  }
  return out;
}

}  // namespace vt::autograd
