// Gradients of scatter with a product or an extreme.
#include "autograd/formulas/reduction.h"
#include "vt/ops.h"

namespace vt::autograd {
namespace {

Tensor zero() { return wrapped_scalar(Scalar(0)); }
Tensor one() { return wrapped_scalar(Scalar(1)); }
/// 0 where the index replaces what self had.
Tensor without_scattered(const Tensor& t, int64_t dim, const Tensor& index, bool include_self) {
  return include_self ? t : ops::scatter_value(t, dim, index, zero());
}

std::tuple<Tensor, Tensor> extreme(const Tensor& grad, const Tensor& self, int64_t dim,
                                   const Tensor& index, const Tensor& src, bool include_self,
                                   const Tensor& result) {
  const Tensor self_is = without_scattered(ops::_to_dtype(ops::eq(self, result), grad.dtype()), dim,
                                           index, include_self);
  const Tensor src_is =
      ops::_to_dtype(ops::eq(src, ops::gather(result, dim, index, false)), grad.dtype());
  const Tensor count = ops::scatter_add(self_is, dim, index, src_is);
  const Tensor share =
      ops::div(grad, ops::maximum(count, ops::ones({}, count.dtype(), count.device())));
  return {ops::mul(self_is, share), ops::mul(src_is, ops::gather(share, dim, index, false))};
}

/// The product of a place's other factors: `nonzero` is the product of its factors that are not
/// zero, `zeros` how many are.
Tensor other_factors(const Tensor& x, const Tensor& nonzero, const Tensor& zeros) {
  const Tensor is_zero = ops::eq(x, zero());
  const Tensor alone = ops::where(ops::eq(zeros, one()), nonzero, zero());
  const Tensor rest =
      ops::where(ops::eq(zeros, zero()), ops::div(nonzero, ops::where(is_zero, one(), x)), zero());
  return ops::where(is_zero, alone, rest);
}

std::tuple<Tensor, Tensor> product(const Tensor& grad, const Tensor& self, int64_t dim,
                                   const Tensor& index, const Tensor& src, bool include_self) {
  const Tensor self_zero = ops::eq(self, zero()), src_zero = ops::eq(src, zero());
  const Tensor safe_self = ops::masked_fill(self, self_zero, one());
  const Tensor safe_src = ops::masked_fill(src, src_zero, one());
  const Tensor nonzero =
      ops::_scatter_reduce(safe_self, dim, index, safe_src, "prod", include_self);
  const Tensor zeros = ops::scatter_add(
      without_scattered(ops::_to_dtype(self_zero, grad.dtype()), dim, index, include_self), dim,
      index, ops::_to_dtype(src_zero, grad.dtype()));
  const Tensor of_self = without_scattered(ops::mul(grad, other_factors(self, nonzero, zeros)), dim,
                                           index, include_self);
  const Tensor of_src = ops::mul(ops::gather(grad, dim, index, false),
                                 other_factors(src, ops::gather(nonzero, dim, index, false),
                                               ops::gather(zeros, dim, index, false)));
  return {of_self, of_src};
}

}  // namespace

std::tuple<Tensor, Tensor> scatter_reduce_backward(const Tensor& grad, const Tensor& self,
                                                   int64_t dim, const Tensor& index,
                                                   const Tensor& given, std::string_view reduce,
                                                   bool include_self, const Tensor& result) {
  // Only the part of src that the index covers takes part.
  Tensor src = given;
  for (int64_t d = 0; d < src.dim(); ++d) src = ops::slice(src, d, 0, index.sizes()[d], 1);
  auto [of_self, of_src] = reduce == "prod"
                               ? product(grad, self, dim, index, src, include_self)
                               : extreme(grad, self, dim, index, src, include_self, result);
  for (int64_t d = 0; d < src.dim(); ++d) {
    if (of_src.sizes()[d] == given.sizes()[d]) continue;
    Dims whole(of_src.sizes());
    whole[d] = given.sizes()[d];
    of_src = ops::slice_backward(of_src, whole, d, 0, index.sizes()[d], 1);
  }
  return {of_self, of_src};
}

}  // namespace vt::autograd
