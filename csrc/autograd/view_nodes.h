// The nodes that make views and in-place changes differentiable.
#pragma once

#include "autograd/node.h"

namespace vt::autograd {

/// Gradient of reading `view`'s geometry out of `base`.
class AsStridedViewBackward final : public Node {
 public:
  AsStridedViewBackward(const Tensor& base, const Tensor& view);
  /// The offset is from the base's first element.
  AsStridedViewBackward(Dims base_sizes, Dims base_strides, Dims view_sizes, Dims view_strides,
                        int64_t view_offset);
  TensorVec apply(TensorVec grads) override;
  std::string name() const override { return "AsStridedBackward0"; }

 private:
  Dims base_sizes_, base_strides_, view_sizes_, view_strides_;
  int64_t view_offset_;  // from the base's first element
};

/// History of a base after one of its views was written by `fn`.
class CopySlices final : public Node {
 public:
  CopySlices(const Tensor& base, const Tensor& view, Ref<Node> fn);
  ~CopySlices() override;
  /// A node of the view as it is after the change: a view of what this makes.
  Ref<Node> view_after();
  TensorVec apply(TensorVec grads) override;
  void release_saved() override { fn_->release_saved(); }
  std::string name() const override { return "CopySlices"; }

 private:
  Dims base_sizes_, base_strides_, view_sizes_, view_strides_;
  int64_t view_offset_;
  bool dense_ = false;
  Ref<Node> fn_;
};

/// Gives `pieces`, which together are all of `self` along `dim`, one node in place of a slice (or,
/// if `selected`, select) node each: their gradients are joined in one pass, not each spread out
/// to the size of `self` and added. Pieces that an override made are left as they are.
void join_pieces(TensorSpan pieces, const Tensor& self, int64_t dim, bool selected);

/// A non-leaf alias of `t` with history, to differentiate with respect to.
Tensor identity_view(const Tensor& t);

/// Differentiable: the gradient of a base from the gradient of an as_strided view of it.
Tensor as_strided_backward(const Tensor& grad, IntSpan base_sizes, IntSpan base_strides,
                           int64_t base_offset, IntSpan view_sizes, IntSpan view_strides,
                           int64_t view_offset);

}  // namespace vt::autograd
