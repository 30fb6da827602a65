// Graph nodes. A node is the backward of one forward call: `apply` maps gradients of the call's
// outputs to gradients of its inputs.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace vt::autograd {

class Node;

/// Where a gradient goes: input `nr` of node `fn`. A null `fn` means nobody wants it.
struct Edge {
  Ref<Node> fn;
  uint32_t nr = 0;
  bool valid() const { return static_cast<bool>(fn); }
};

/// What the engine knows of a node's input (the forward output it belongs to): a gradient that
/// arrives with another shape is summed down to it (un-broadcasting), another dtype is converted.
struct InputMeta {
  Dims sizes;
  DType dtype;
  Device device;
};

/// What may be taken away again where it was registered, without keeping that alive.
class Hook : public RefCounted {
 public:
  /// Runs `removal` with the AutogradMeta or NodeExtras that holds the hook, unless that is gone.
  void with_owner(const std::function<void(void* owner)>& removal);
  /// Tells the hook where it is: null as that ends.
  void set_owner(void* owner);

 private:
  void* owner_ = nullptr;
};

/// A hook on one gradient; returns an undefined tensor to leave it as it is.
class TensorHook : public Hook {
 public:
  virtual Tensor call(const Tensor& grad) = 0;
};
/// A hook on a node, before (`grad_inputs` absent) or after its apply.
class NodeHook : public Hook {
 public:
  /// May replace entries of `grads`. For post hooks `outputs` are the gradients that came in.
  virtual void call(TensorVec& grads, const TensorVec* outputs) = 0;
};

/// Rarely used parts of a node, allocated when first needed.
struct NodeExtras {
  ~NodeExtras();
  std::vector<std::pair<uint32_t, Ref<TensorHook>>> tensor_hooks;  // before apply, by input
  std::vector<std::pair<uint32_t, TensorImpl*>> retain_grad;  // weak: cleared by the tensor's end
  std::vector<Ref<NodeHook>> pre_hooks;
  std::vector<Ref<NodeHook>> post_hooks;
  Node* slices = nullptr;         // weak: the CopySlices that runs this node, of a view
  std::string forward_trace;      // anomaly mode
  void* python_object = nullptr;  // weak: wrapper while one lives
};

class Node : public RefCounted {
 public:
  explicit Node(uint64_t sequence);
  Node();
  ~Node() override;
  void* operator new(size_t size);
  void operator delete(void* pointer, size_t size) noexcept;

  /// `grads` has one entry per forward output (maybe undefined); the result one per edge.
  virtual TensorVec apply(TensorVec grads) = 0;
  /// Drops saved tensors (after backward without retain_graph).
  virtual void release_saved() {}
  virtual std::string name() const = 0;

  SmallVector<Edge, 3> edges;
  SmallVector<InputMeta, 1> inputs;
  std::unique_ptr<NodeExtras> extras;
  uint64_t sequence;  // later calls have larger numbers and run first
  static constexpr uint64_t kLeafSequence = ~uint64_t{0};

  NodeExtras& ensure_extras() {
    if (!extras) extras = std::make_unique<NodeExtras>();
    return *extras;
  }
  /// Whether this is an AccumulateGrad.
  bool is_leaf() const { return sequence == kLeafSequence; }
  bool wants(size_t edge) const { return edge < edges.size() && edges[edge].valid(); }
  uint32_t add_input(const Tensor& output) {
    inputs.push_back({Dims(output.sizes()), output.dtype(), output.device()});
    return static_cast<uint32_t>(inputs.size() - 1);
  }
  static int64_t live_count();

 protected:
  /// Graphs are long chains; freeing one must not recurse. Nodes are freed from a queue.
  void destroy() override;
};

struct AutogradMeta;

/// Adds a leaf's incoming gradient to its `.grad`.
class AccumulateGrad final : public Node {
 public:
  explicit AccumulateGrad(Tensor leaf);
  TensorVec apply(TensorVec grads) override;
  /// The leaf's own hooks, in order; each may replace `grad`. The engine calls them before apply.
  void call_hooks(Tensor& grad);
  std::string name() const override { return "AccumulateGrad"; }
  Tensor variable;

 protected:
  void destroy() override;

 private:
  void accumulate(AutogradMeta& meta, Tensor grad);

  // Held while the gradient is added. An op that is overridden may run a backward inside.
  std::recursive_mutex mutex_;
};

class PostAccumulateHook : public Hook {
 public:
  virtual void call(const Tensor& variable) = 0;
};

/// The autograd side of a tensor; absent on tensors that never met autograd.
struct AutogradMeta {
  ~AutogradMeta();
  /// Takes all hooks away; handles that are left then find nothing to remove.
  void drop_hooks();
  /// Takes the wish to retain a gradient away from grad_fn.
  void forget_retained();
  Ref<Node> grad_fn;
  uint32_t output_nr = 0;
  Node* accumulator = nullptr;  // weak; guarded by accumulator_mutex()
  Tensor grad;
  std::vector<Ref<TensorHook>> hooks;  // leaf hooks
  std::vector<Ref<PostAccumulateHook>> post_accumulate_hooks;
  TensorImpl* owner = nullptr;  // set with retains_grad
  bool retains_grad = false;
  // Views: the tensor whose history this one belongs to.
  // Function: by a custom Function, from its input; it has no base.
  enum class Created : uint8_t { Normal, NoGrad, Inference, Function };
  Tensor base;  // defined for views; itself never a view
  Created created = Created::Normal;
  uint32_t view_version = 0;  // version at which grad_fn was made
};

/// The hooks of the node that accumulates a leaf's gradient, if there is one: those before, then
/// those after.
std::vector<Ref<NodeHook>> accumulator_hooks(const AutogradMeta& meta);

}  // namespace vt::autograd
