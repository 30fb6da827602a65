// In-place forms that are an op and a copy, and views in place.
#include "autograd/front.h"
#include "core/rebinding.h"
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor write(const Tensor& self, const Tensor& result, std::string_view op) {
  check(vt::equal(self.sizes(), result.sizes()), op, ": the result of shape ", result.sizes(),
        " does not fit the output of shape ", self.sizes(), "; use the out-of-place form");
  check(can_cast(result.dtype(), self.dtype()), op, ": result type ", result.dtype(),
        " can't be cast to the desired output type ", self.dtype());
  return ops::copy_(self, result, false);
}

/// What an op may save for its gradient: a copy, if `self` is about to be overwritten.
Tensor before(const Tensor& self) {
  return thread_state.grad_enabled && autograd::any_requires_grad(self)
             ? ops::clone(self, std::nullopt)
             : self;
}

/// Gives the handle `self` the geometry and the history of `view`, a view of it. Other views of the
/// storage keep theirs. Nothing is written, so no version changes.
Tensor become(const Tensor& self, const Tensor& view, std::string_view op) {
  check(!thread_state.consumer, op,
        " changes the shape of a tensor that recorded ops may use; use the out-of-place form");
  TensorImpl* impl = self.impl();
  if (const Ref<autograd::Node>& node = autograd::grad_fn(view)) {
    if (!autograd::grad_fn(self)) {
      fail("a leaf Variable that requires grad is being used in an in-place operation. (", op,
           " on ", self, "; wrap the update in torch.no_grad(), or work on a clone)");
    }
    const Ref<autograd::Node> kept = node;
    autograd::set_grad_fn(self, kept, view.impl()->autograd->output_nr);
  }
  const Dims sizes(view.sizes()), strides(view.strides());
  impl->set_geometry(sizes, strides, view.storage_offset());
  note_rebinding();
  return self;
}

}  // namespace

Tensor eq_(const Tensor& self, const Tensor& other) {
  return write(self, ops::eq(self, other), "eq_");
}
Tensor ne_(const Tensor& self, const Tensor& other) {
  return write(self, ops::ne(self, other), "ne_");
}
Tensor lt_(const Tensor& self, const Tensor& other) {
  return write(self, ops::lt(self, other), "lt_");
}
Tensor le_(const Tensor& self, const Tensor& other) {
  return write(self, ops::le(self, other), "le_");
}
Tensor gt_(const Tensor& self, const Tensor& other) {
  return write(self, ops::gt(self, other), "gt_");
}
Tensor ge_(const Tensor& self, const Tensor& other) {
  return write(self, ops::ge(self, other), "ge_");
}
Tensor logical_and_(const Tensor& self, const Tensor& other) {
  return write(self, ops::logical_and(self, other), "logical_and_");
}
Tensor logical_or_(const Tensor& self, const Tensor& other) {
  return write(self, ops::logical_or(self, other), "logical_or_");
}
Tensor logical_xor_(const Tensor& self, const Tensor& other) {
  return write(self, ops::logical_xor(self, other), "logical_xor_");
}
Tensor logical_not_(const Tensor& self) {
  return write(self, ops::logical_not(self), "logical_not_");
}
Tensor logit_(const Tensor& self, std::optional<double> eps) {
  return write(self, ops::logit(before(self), eps), "logit_");
}
Tensor cumsum_(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return write(self, ops::cumsum(self, dim, dtype.value_or(self.dtype())), "cumsum_");
}
Tensor cumprod_(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return write(self, ops::cumprod(before(self), dim, dtype.value_or(self.dtype())), "cumprod_");
}
Tensor addmm_(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const Scalar& beta,
              const Scalar& alpha) {
  return write(self, ops::addmm(self, mat1, mat2, beta, alpha), "addmm_");
}
Tensor addmv_(const Tensor& self, const Tensor& mat, const Tensor& vec, const Scalar& beta,
              const Scalar& alpha) {
  return write(self, ops::addmv(self, mat, vec, beta, alpha), "addmv_");
}
Tensor addbmm_(const Tensor& self, const Tensor& batch1, const Tensor& batch2, const Scalar& beta,
               const Scalar& alpha) {
  return write(self, ops::addbmm(self, batch1, batch2, beta, alpha), "addbmm_");
}
Tensor baddbmm_(const Tensor& self, const Tensor& batch1, const Tensor& batch2, const Scalar& beta,
                const Scalar& alpha) {
  return write(self, ops::baddbmm(self, batch1, batch2, beta, alpha), "baddbmm_");
}
Tensor addr_(const Tensor& self, const Tensor& vec1, const Tensor& vec2, const Scalar& beta,
             const Scalar& alpha) {
  return write(self, ops::addr(self, vec1, vec2, beta, alpha), "addr_");
}

Tensor transpose_(const Tensor& self, int64_t dim0, int64_t dim1) {
  return become(self, ops::transpose(self, dim0, dim1), "transpose_");
}
Tensor t_(const Tensor& self) { return become(self, ops::t(self), "t_"); }
Tensor squeeze_(const Tensor& self) { return become(self, ops::squeeze(self), "squeeze_"); }
Tensor squeeze__dim(const Tensor& self, IntSpan dim) {
  return become(self, ops::squeeze_dim(self, dim), "squeeze_");
}
Tensor unsqueeze_(const Tensor& self, int64_t dim) {
  return become(self, ops::unsqueeze(self, dim), "unsqueeze_");
}
Tensor as_strided_(const Tensor& self, IntSpan size, IntSpan stride,
                   std::optional<int64_t> storage_offset) {
  return become(self, ops::as_strided(self, size, stride, storage_offset), "as_strided_");
}

}  // namespace vt::composite
