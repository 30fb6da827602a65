// Scattering with a reduction, and writes at flat indices.
#include "autograd/front.h"
#include "core/tensor_iterator.h"
#include "ops/composite/placement.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

/// `src` as a tensor of the index's shape and self's dtype: a number is spread over the index.
Tensor spread(const Tensor& src, const Tensor& index, DType dtype) {
  const Tensor typed = src.dtype() == dtype ? src : ops::_to_dtype(src, dtype);
  const Tensor value = number_on(typed, index.device());
  return src.dim() == 0 && index.dim() != 0 ? ops::expand(value, index.sizes(), false) : value;
}

/// What an op may save for its gradient: a copy, if `self` is about to be overwritten.
Tensor before(const Tensor& self, const Tensor& src) {
  return autograd::should_record(self, src) ? ops::clone(self, std::nullopt) : self;
}

}  // namespace

Tensor scatter_reduce(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                      std::string_view reduce, bool include_self) {
  check(reduce == "sum" || reduce == "mean" || reduce == "prod" || reduce == "amax" ||
            reduce == "amin",
        "reduce argument must be either sum, prod, mean, amax or amin, got ", reduce);
  check(self.dtype() == src.dtype(),
        "scatter(): Expected self.dtype to be equal to src.dtype, got ", self.dtype(), " and ",
        src.dtype());
  if (reduce == "prod" || reduce == "amax" || reduce == "amin") {
    return ops::_scatter_reduce(self, dim, index, src, reduce, include_self);
  }
  const Tensor base =
      include_self ? self : ops::scatter_value(self, dim, index, wrapped_scalar(Scalar(0)));
  const Tensor total = ops::scatter_add(base, dim, index, src);
  if (reduce == "sum") return total;
  Tensor count = ops::ones(self.sizes(), self.dtype(), self.device());
  if (!include_self) count = ops::scatter_value(count, dim, index, wrapped_scalar(Scalar(0)));
  count =
      ops::scatter_add(count, dim, index, ops::ones(index.sizes(), self.dtype(), self.device()));
  count = ops::maximum(count, ops::ones({}, self.dtype(), self.device()));
  return is_floating(self.dtype()) ? ops::div(total, count) : ops::floor_divide(total, count);
}
Tensor scatter_reduce_(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                       std::string_view reduce, bool include_self) {
  return ops::copy_(
      self, ops::scatter_reduce(before(self, src), dim, index, src, reduce, include_self), false);
}

// The rows scatter.reduce and scatter_.reduce (reduce= of scatter).
Tensor scatter__by(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                   std::string_view reduce) {
  return ops::copy_(self, ops::scatter_by(before(self, src), dim, index, src, reduce), false);
}
Tensor scatter_by(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                  std::string_view reduce) {
  check(reduce == "add" || reduce == "multiply",
        "reduce argument must be either add or multiply, got ", reduce);
  const Tensor values = spread(src, index, self.dtype());
  if (reduce == "add") return ops::scatter_add(self, dim, index, values);
  return ops::_scatter_reduce(self, dim, index, values, "prod", true);
}

Tensor put_(const Tensor& self, const Tensor& index, const Tensor& source, bool accumulate) {
  check(self.dtype() == source.dtype(),
        "put_(): self and source expected to have the same dtype, but got self.dtype = ",
        self.dtype(), " and source.dtype = ", source.dtype());
  check(index.numel() == source.numel(),
        "put_(): Expected source and index to have the same number of elements, but got "
        "source.numel() = ",
        source.numel(), ", index.numel() = ", index.numel());
  const Tensor flat = ops::reshape(ops::clone(self, MemoryFormat::Contiguous), Dims{-1});
  const Tensor at[] = {ops::reshape(index, Dims{-1})};
  ops::index_put_(flat, at, ops::reshape(source, Dims{-1}), accumulate);
  return ops::copy_(self, ops::reshape(flat, self.sizes()), false);
}
Tensor put(const Tensor& self, const Tensor& index, const Tensor& source, bool accumulate) {
  return ops::put_(ops::clone(self, std::nullopt), index, source, accumulate);
}
Tensor masked_scatter(const Tensor& self, const Tensor& mask, const Tensor& source) {
  const Dims shape = broadcast_shapes(self.sizes(), mask.sizes());
  const Tensor whole = vt::equal(shape, self.sizes())
                           ? ops::clone(self, std::nullopt)
                           : ops::clone(ops::expand(self, shape, false), MemoryFormat::Contiguous);
  return ops::masked_scatter_(whole, mask, source);
}

}  // namespace vt::composite

namespace vt::meta {

Tensor _scatter_reduce(const Tensor& self, int64_t dim, const Tensor&, const Tensor&,
                       std::string_view, bool) {
  wrap_dim(dim, self.dim());
  return empty(self.sizes(), self.dtype(), self.device());
}

}  // namespace vt::meta
