#include "autograd/view_nodes.h"

#include "autograd/front.h"
#include "core/overlap.h"
#include "vt/nodes.h"
#include "vt/ops.h"

namespace vt::autograd {
namespace {

class IdentityBackward final : public Node {
 public:
  TensorVec apply(TensorVec grads) override { return grads; }
  std::string name() const override { return "AliasBackward0"; }
};

/// Backward of cutting a tensor into pieces along a dimension.
class PiecesBackward final : public Node {
 public:
  PiecesBackward(int64_t dim, bool selected) : dim_(dim), selected_(selected) {}
  TensorVec apply(TensorVec grads) override {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].defined()) continue;
      const Tensor zero = ops::zeros(Dims{}, inputs[i].dtype, inputs[i].device);
      grads[i] = ops::expand(zero, inputs[i].sizes, false);
    }
    return {selected_ ? ops::stack(grads, dim_) : ops::cat(grads, dim_)};
  }
  std::string name() const override { return selected_ ? "UnbindBackward0" : "SplitBackward0"; }

 private:
  int64_t dim_;
  bool selected_;
};

bool overlapping(IntSpan sizes, IntSpan strides) {
  SmallVector<std::pair<int64_t, int64_t>, 6> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1) dims.push_back({strides[i], sizes[i]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

}  // namespace

Tensor as_strided_backward(const Tensor& grad, IntSpan base_sizes, IntSpan base_strides,
                           int64_t base_offset, IntSpan view_sizes, IntSpan view_strides,
                           int64_t view_offset) {
  const int64_t low = std::min(base_offset, view_offset);
  const int64_t extent = std::max(base_offset + span_elements(base_sizes, base_strides),
                                  view_offset + span_elements(view_sizes, view_strides)) -
                         low;
  const Dims flat{extent};
  Tensor storage = ops::zeros(flat, grad.dtype(), grad.device());
  if (overlapping(view_sizes, view_strides)) {
    const Tensor positions = ops::arange_start(Scalar(int64_t{0}), Scalar(extent), Scalar(1),
                                               DType::Int64, grad.device());
    const Tensor index = ops::reshape(
        ops::as_strided(positions, view_sizes, view_strides, view_offset - low), Dims{-1});
    storage = ops::index_add(storage, 0, index, ops::reshape(grad, Dims{-1}), Scalar(1));
  } else {
    storage = ops::as_strided_scatter(storage, grad, view_sizes, view_strides, view_offset - low);
  }
  return ops::as_strided(storage, base_sizes, base_strides, base_offset - low);
}

AsStridedViewBackward::AsStridedViewBackward(const Tensor& base, const Tensor& view)
    : AsStridedViewBackward(Dims(base.sizes()), Dims(base.strides()), Dims(view.sizes()),
                            Dims(view.strides()), view.storage_offset() - base.storage_offset()) {}

AsStridedViewBackward::AsStridedViewBackward(Dims base_sizes, Dims base_strides, Dims view_sizes,
                                             Dims view_strides, int64_t view_offset)
    : base_sizes_(std::move(base_sizes)),
      base_strides_(std::move(base_strides)),
      view_sizes_(std::move(view_sizes)),
      view_strides_(std::move(view_strides)),
      view_offset_(view_offset) {}

TensorVec AsStridedViewBackward::apply(TensorVec grads) {
  if (!grads[0].defined()) return TensorVec(1);
  return {as_strided_backward(grads[0], base_sizes_, base_strides_, 0, view_sizes_, view_strides_,
                              view_offset_)};
}

CopySlices::CopySlices(const Tensor& base, const Tensor& view, Ref<Node> fn)
    : base_sizes_(base.sizes()),
      base_strides_(base.strides()),
      view_sizes_(view.sizes()),
      view_strides_(view.strides()),
      view_offset_(view.storage_offset() - base.storage_offset()),
      fn_(std::move(fn)) {
  // The view lies in memory as the base does, which may be a part of more.
  dense_ = base.is_non_overlapping_and_dense();
  fn_->ensure_extras().slices = this;
  // Edge 0 goes to the base's old history; the others are fn's own (its edge 0 was the view).
  add_edges(*this, base);
  for (size_t i = 1; i < fn_->edges.size(); ++i) edges.push_back(fn_->edges[i]);
}

CopySlices::~CopySlices() {
  if (fn_->extras) fn_->extras->slices = nullptr;
}

Ref<Node> CopySlices::view_after() {
  auto node = make_ref<AsStridedViewBackward>(base_sizes_, base_strides_, view_sizes_,
                                              view_strides_, view_offset_);
  node->edges.push_back({Ref<Node>(this), 0});
  node->inputs.push_back({view_sizes_, inputs[0].dtype, inputs[0].device});
  return node;
}

TensorVec CopySlices::apply(TensorVec grads) {
  TensorVec result(edges.size());
  if (!grads[0].defined()) return result;
  const Tensor& grad = grads[0];
  // Of a base that is a part of more memory, all between its first element and its last.
  Tensor base_grad;
  if (dense_) {
    base_grad = empty_strided(base_sizes_, base_strides_, grad.dtype(), grad.device());
    base_grad = ops::copy(base_grad, grad, false);
  } else {
    const Dims flat{span_elements(base_sizes_, base_strides_)};
    base_grad = ops::as_strided_scatter(ops::zeros(flat, grad.dtype(), grad.device()), grad,
                                        base_sizes_, base_strides_, 0);
  }
  const Tensor slice = ops::contiguous(
      ops::as_strided(base_grad, view_sizes_, view_strides_, view_offset_), std::nullopt);
  TensorVec inner = fn_->apply({ops::clone(slice, std::nullopt)});
  for (size_t i = 1; i < inner.size() && i < result.size(); ++i) result[i] = std::move(inner[i]);
  if (!wants(0)) return result;
  Tensor written = inner.empty() || !inner[0].defined()
                       ? ops::zeros(view_sizes_, grad.dtype(), grad.device())
                       : inner[0];
  result[0] = ops::as_strided_scatter(base_grad, written, view_sizes_, view_strides_, view_offset_);
  if (!dense_) result[0] = ops::as_strided(result[0], base_sizes_, base_strides_, 0);
  return result;
}

void join_pieces(TensorSpan pieces, const Tensor& self, int64_t dim, bool selected) {
  if (pieces.size() < 2 || !should_record(self)) return;
  for (const Tensor& piece : pieces) {
    const Node* node = grad_fn(piece).get();
    const bool cut = selected ? dynamic_cast<const SelectBackward*>(node) != nullptr
                              : dynamic_cast<const SliceBackward*>(node) != nullptr;
    if (!cut || node->edges[0].fn.get() != gradient_edge(self).fn.get()) return;
  }
  const auto joined = make_node<PiecesBackward>(dim, selected);
  add_edges(*joined, self);
  set_history(pieces, joined);
}

Tensor identity_view(const Tensor& t) {
  Tensor out = alias(t);
  auto node = make_ref<IdentityBackward>();
  add_edges(*node, t);
  set_history(out, node);
  return out;
}

}  // namespace vt::autograd
