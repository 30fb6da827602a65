// What the generated op fronts call to build the graph.
#pragma once

#include <array>

#include "core/function_ref.h"

#include "autograd/node.h"
#include "autograd/saved_tensor.h"
#include "dispatch/thread_state.h"

namespace vt::autograd {

inline bool requires_grad(const Tensor& t) {
  if (!t.defined()) return false;
  const TensorImpl* impl = t.impl();
  return impl->requires_grad || (impl->autograd && impl->autograd->grad_fn);
}
/// As requires_grad, after bringing a view up to date with changes made through its base.
bool requires_grad_slow(const Tensor& t);
inline bool any_requires_grad(const Tensor& t) {
  if (!t.defined()) return false;
  const TensorImpl* impl = t.impl();
  if (impl->requires_grad) return true;
  return impl->autograd &&
         (impl->autograd->grad_fn || (impl->autograd->base.defined() && requires_grad_slow(t)));
}
inline bool any_requires_grad(TensorSpan tensors) {
  for (const Tensor& t : tensors) {
    if (any_requires_grad(t)) return true;
  }
  return false;
}
/// Whether a call over these tensors must be put on the graph.
template <class... T>
inline bool should_record(const T&... inputs) {
  return thread_state.grad_enabled && (any_requires_grad(inputs) || ...);
}

/// The node that made `t` (bringing views up to date), or null for leaves.
const Ref<Node>& grad_fn(const Tensor& t);
/// Where `t`'s gradient goes: its node, or its accumulator if it is a leaf that requires grad.
Edge gradient_edge(const Tensor& t);
Ref<Node> grad_accumulator(const Tensor& leaf);
/// Graphs made from now on accumulate in another node: the leaf takes gradients of another dtype or
/// device than those made before, which are still about to come.
void renew_accumulator(const Tensor& leaf);
void add_edges(Node& node, const Tensor& t);
void add_edges(Node& node, TensorSpan tensors);
AutogradMeta& ensure_meta(const Tensor& t);
/// Makes `node` (null for none) the one that made `t`. Every change of a history goes through here:
/// a gradient that is retained is that of the tensor as it is now, so the wish moves along.
void set_grad_fn(const Tensor& t, Ref<Node> node, uint32_t output_nr);

/// Marks `output` as made by `node`. Integer outputs stay outside the graph.
void set_history(const Tensor& output, const Ref<Node>& node);
void set_history(TensorSpan outputs, const Ref<Node>& node);
/// Errors for in-place changes that autograd cannot express (a leaf that requires grad, …).
/// `records`: whether the call itself is recorded.
void check_inplace(const Tensor& self, bool records, std::string_view op);
/// After an in-place op: bumps the version; `self` (and the base it views) now come from `node`
/// (null when not recorded).
void rebase_history(const Tensor& self, const Ref<Node>& node);
/// Ties a fresh view to its base.
void set_view(const Tensor& view, const Tensor& base);
/// Outputs made under inference_mode are marked.
inline void mark_inference(const Tensor& t) {
  if (thread_state.inference_mode) [[unlikely]]
    t.impl()->inference = true;
}

/// Called when anomaly mode wants the line that built a node; set by the Python layer.
extern std::string (*forward_trace)();
/// Adds a note to the exception being handled if it is one of the Python layer's own (raised in a
/// hook or a Function), which must keep its class; false for others.
extern bool (*note_foreign_error)(const std::string& note);
void note_forward(Node& node);
template <class T, class... A>
Ref<T> make_node(A&&... args) {
  Ref<T> node = make_ref<T>(std::forward<A>(args)...);
  if (thread_state.anomaly_enabled) [[unlikely]]
    note_forward(*node);
  return node;
}

/// The vjp of `composite` at `inputs` for output gradients `grads`, itself differentiable: what
/// backs `via_composite` rows under create_graph.
TensorVec composite_vjp(FunctionRef<TensorVec(TensorSpan)> composite, TensorSpan inputs,
                        TensorSpan grads, std::span<const bool> wanted);

}  // namespace vt::autograd
