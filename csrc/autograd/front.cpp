#include "autograd/front.h"

#include "autograd/engine.h"
#include "autograd/gradient_observer.h"
#include "autograd/view_nodes.h"
#include "core/rebinding.h"

namespace vt::autograd {

std::string (*forward_trace)() = nullptr;
bool (*note_foreign_error)(const std::string& note) = nullptr;

void note_forward(Node& node) {
  if (forward_trace) node.ensure_extras().forward_trace = forward_trace();
}

AutogradMeta& ensure_meta(const Tensor& t) {
  auto& meta = t.impl()->autograd;
  if (!meta) meta = std::make_unique<AutogradMeta>();
  return *meta;
}

bool requires_grad_slow(const Tensor& t) {
  return requires_grad(t) || static_cast<bool>(grad_fn(t));
}

void set_grad_fn(const Tensor& t, Ref<Node> node, uint32_t output_nr) {
  AutogradMeta& meta = ensure_meta(t);
  if (meta.retains_grad) [[unlikely]]
    meta.forget_retained();
  meta.grad_fn = std::move(node);
  meta.output_nr = output_nr;
  meta.view_version = t.version();
  if (meta.retains_grad && meta.grad_fn) [[unlikely]]
    meta.grad_fn->ensure_extras().retain_grad.push_back({output_nr, t.impl()});
}

const Ref<Node>& grad_fn(const Tensor& t) {
  static const Ref<Node> none;
  AutogradMeta* meta = t.impl()->autograd.get();
  if (!meta) return none;
  if (meta->base.defined() && meta->view_version != t.version()) {
    // The base (or a sibling view) was changed in place: this view's history is the base's new one.
    const Tensor& base = meta->base;
    if (requires_grad(base)) {
      auto node = make_ref<AsStridedViewBackward>(base, t);
      node->add_input(t);
      add_edges(*node, base);
      set_grad_fn(t, std::move(node), 0);
    }
    meta->view_version = t.version();
  }
  return meta->grad_fn;
}

Edge gradient_edge(const Tensor& t) {
  if (const Ref<Node>& fn = grad_fn(t)) return {fn, t.impl()->autograd->output_nr};
  if (t.impl()->requires_grad) return {grad_accumulator(t), 0};
  return {};
}

void add_edges(Node& node, const Tensor& t) {
  node.edges.push_back(t.defined() ? gradient_edge(t) : Edge{});
}
void add_edges(Node& node, TensorSpan tensors) {
  for (const Tensor& t : tensors) add_edges(node, t);
}

void set_history(const Tensor& output, const Ref<Node>& node) {
  const uint32_t nr = node->add_input(output);
  if (!is_floating(output.dtype())) return;
  set_grad_fn(output, node, nr);
}
void set_history(TensorSpan outputs, const Ref<Node>& node) {
  for (const Tensor& t : outputs) set_history(t, node);
}

void check_inplace(const Tensor& self, bool records, std::string_view op) {
  const TensorImpl* impl = self.impl();
  check(impl->storage->writable(), op,
        ": the tensor views read-only memory (a read-only NumPy array or "
        "DLPack buffer); clone() it before changing it in place");
  if (impl->inference && !thread_state.inference_mode) [[unlikely]] {
    fail(op,
         ": Inplace update to inference tensor outside InferenceMode is not allowed; clone() it to "
         "get a normal tensor");
  }
  if (!thread_state.grad_enabled) return;
  if (impl->requires_grad && (!impl->autograd || !impl->autograd->grad_fn)) {
    fail("a leaf Variable that requires grad is being used in an in-place operation. (", op, " on ",
         self, "; wrap the update in torch.no_grad(), or work on a clone)");
  }
  const AutogradMeta* meta = impl->autograd.get();
  if (!meta) return;
  if (meta->created == AutogradMeta::Created::Function && meta->grad_fn) [[unlikely]] {
    fail(
        "The output of a custom Function that is its input, or a view of it, is being modified "
        "inplace (",
        op, " on ", self,
        "), past its backward. Return a clone from forward, or change the input there and name it "
        "with ctx.mark_dirty().");
  }
  if (!meta->base.defined()) return;
  const Tensor& base = meta->base;
  const bool matters = records || requires_grad(base);
  if (!matters) return;
  if (base.impl()->requires_grad && (!base.impl()->autograd || !base.impl()->autograd->grad_fn)) {
    fail("a view of a leaf Variable that requires grad is being used in an in-place operation. (",
         op, " on ", self, ")");
  }
  if (meta->created == AutogradMeta::Created::NoGrad) {
    fail(
        "A view was created in no_grad mode and is being modified inplace with grad mode enabled (",
        op, " on ", self, "). Clone it, or make the view outside no_grad.");
  }
  if (meta->created == AutogradMeta::Created::Inference) {
    fail("A view was created in inference mode and is being modified inplace in normal mode (", op,
         " on ", self, "). Clone it, or make the view outside inference_mode.");
  }
}

void rebase_history(const Tensor& self, const Ref<Node>& node) {
  self.bump_version();
  if (!node || !is_floating(self.dtype())) return;  // integers stay outside the graph
  note_tensor_changes(self);
  AutogradMeta& meta = ensure_meta(self);
  if (!meta.base.defined()) {
    set_grad_fn(self, node, node->add_input(self));
    if (self.impl()->requires_grad) {
      self.impl()->requires_grad = false;
      note_rebinding();
    }
    return;
  }
  // The view was written: the base now comes from CopySlices, which sends the written part of the
  // gradient through `node` and the rest to the base's old history.
  const Tensor base = meta.base;
  note_tensor_changes(base);
  node->add_input(self);
  auto slices = make_node<CopySlices>(base, self, node);
  set_grad_fn(base, slices, slices->add_input(base));
  meta.view_version = self.version() - 1;  // stale: regenerated from the base when asked for
  grad_fn(self);
}

void set_view(const Tensor& view, const Tensor& base) {
  using Created = AutogradMeta::Created;
  if (view.is_same(base)) return;
  // Under inference_mode only what a later error needs is kept.
  if (thread_state.inference_mode && (base.impl()->inference || !any_requires_grad(base))) return;
  AutogradMeta& meta = ensure_meta(view);
  const AutogradMeta* base_meta = base.impl()->autograd.get();
  // A leaf may be a view of what was there before it became one; its own views are views of a leaf.
  const bool leaf = base.impl()->requires_grad && base_meta && !base_meta->grad_fn;
  const bool of_view = base_meta && base_meta->base.defined() && !leaf;
  meta.base = of_view ? base_meta->base : base;
  if (of_view && base_meta->created != Created::Normal) {
    meta.created = base_meta->created;
  } else if (!thread_state.grad_enabled) {
    meta.created = thread_state.inference_mode ? Created::Inference : Created::NoGrad;
  }
  meta.view_version = view.version();
}

TensorVec composite_vjp(FunctionRef<TensorVec(TensorSpan)> composite, TensorSpan inputs,
                        TensorSpan grads, std::span<const bool> wanted) {
  const GradMode enable(true);
  // Differentiate with respect to fresh aliases, so that only this composite is walked; the result
  // still depends on `inputs` and `grads` through their own histories.
  std::vector<Tensor> aliases, targets;
  for (size_t i = 0; i < inputs.size(); ++i) {
    aliases.push_back(wanted[i] ? identity_view(inputs[i]) : inputs[i]);
    if (wanted[i]) targets.push_back(aliases.back());
  }
  const TensorVec outputs = composite(aliases);
  std::vector<Tensor> roots, root_grads;
  for (size_t i = 0; i < outputs.size() && i < grads.size(); ++i) {
    if (!grads[i].defined() || !requires_grad(outputs[i])) continue;
    roots.push_back(outputs[i]);
    root_grads.push_back(grads[i]);
  }
  TensorVec result(inputs.size());
  if (roots.empty() || targets.empty()) return result;
  const std::vector<Tensor> found =
      grad(roots, root_grads, targets,
           {.retain_graph = true, .create_graph = true, .allow_unused = true});
  for (size_t i = 0, k = 0; i < inputs.size(); ++i) {
    if (wanted[i]) result[i] = found[k++];
  }
  return result;
}

}  // namespace vt::autograd
