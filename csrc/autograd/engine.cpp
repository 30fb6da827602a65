#include "autograd/engine.h"

#include <cmath>
#include <queue>
#include <unordered_map>
#include <utility>

#include "autograd/front.h"
#include "dispatch/consumer.h"
#include "vt/ops.h"

namespace vt::autograd {
namespace {

thread_local int backward_depth = 0;

/// Gradients gathered for a node until all its users have reported.
struct Pending {
  TensorVec grads;
  int missing = 0;     // users that have not run yet
  bool needed = true;  // on a path to a wanted input (always true without `inputs`)
};

struct Later {
  bool operator()(const Node* a, const Node* b) const { return a->sequence < b->sequence; }
};

/// Brings a gradient to the shape, dtype and device of the value it belongs to.
Tensor fit(Tensor grad, const Node& node, uint32_t nr) {
  const InputMeta& meta = node.inputs[nr];
  if (!equal(grad.sizes(), meta.sizes)) {
    check(grad.sizes().size() >= meta.sizes.size(), "Function ", node.name(),
          " returned an invalid gradient at index ", nr, " - got ", grad.sizes(),
          " but expected shape compatible with ", IntSpan(meta.sizes));
    grad = ops::sum_to_size(grad, meta.sizes);
  }
  if (grad.dtype() != meta.dtype) grad = ops::_to_dtype(grad, meta.dtype);
  check(grad.device() == meta.device, "Function ", node.name(), " returned a gradient on device ",
        grad.device(), " but expected ", meta.device);
  return grad;
}

void accumulate(Tensor& into, Tensor grad) {
  if (!into.defined()) {
    into = std::move(grad);
  } else if (!thread_state.grad_enabled && sole_owner(into) && into.is_contiguous() &&
             into.dtype() == grad.dtype()) {
    ops::add_(into, grad, Scalar(1));
  } else {
    into = ops::add(into, grad, Scalar(1));
  }
}

class GraphTask {
 public:
  explicit GraphTask(const BackwardOptions& options) : options_(options) {}

  /// Wanted inputs: capture[i] receives the gradient that arrives at edge i. With `accumulate`,
  /// leaves take theirs as in any backward, and their capture[i] stays undefined.
  void capture(const std::vector<Edge>& wanted, bool accumulate) {
    accumulate_ = accumulate;
    captured_.resize(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i].valid()) captures_[wanted[i].fn.get()].push_back({wanted[i].nr, i});
    }
    limited_ = true;
  }

  std::vector<Tensor> run(const std::vector<Edge>& roots, TensorSpan gradients) {
    discover(roots);
    const GradMode grad_mode(options_.create_graph);
    for (size_t i = 0; i < roots.size(); ++i) {
      Pending& pending = pending_[roots[i].fn.get()];
      pending.grads.resize(std::max(pending.grads.size(), roots[i].fn->inputs.size()));
      accumulate(pending.grads[roots[i].nr], fit(gradients[i], *roots[i].fn, roots[i].nr));
    }
    for (const Edge& root : roots) {
      Pending& pending = pending_[root.fn.get()];
      if (pending.missing == 0 && !pending.grads.empty() &&
          queued_.insert({root.fn.get(), true}).second) {
        ready_.push(root.fn.get());
      }
    }
    while (!ready_.empty()) {
      Node* node = ready_.top();
      ready_.pop();
      step(node);
    }
    return std::move(captured_);
  }

 private:
  struct CaptureAt {
    uint32_t nr;
    size_t index;
  };

  /// Counts the users of every node that can be reached, without recursion, and (with wanted
  /// inputs) marks the nodes that lead to one: those above a captured edge.
  void discover(const std::vector<Edge>& roots) {
    struct Visit {
      Node* node;
      size_t next_edge;
    };
    std::vector<Visit> stack;
    auto enter = [&](Node* node) {
      const auto [found, fresh] = pending_.try_emplace(node);
      if (fresh) {
        if (limited_) found->second.needed = captures_.contains(node);
        stack.push_back({node, 0});
      }
    };
    for (const Edge& root : roots) {
      keep_.push_back(root.fn);
      enter(root.fn.get());
      while (!stack.empty()) {
        Visit& visit = stack.back();
        Node* node = visit.node;
        if (visit.next_edge < node->edges.size()) {
          const Edge& edge = node->edges[visit.next_edge++];
          if (!edge.valid()) continue;
          enter(edge.fn.get());
          ++pending_[edge.fn.get()].missing;
          continue;
        }
        stack.pop_back();
        if (!limited_) continue;
        bool needed = pending_[node].needed;
        for (const Edge& edge : node->edges)
          needed = needed || (edge.valid() && pending_[edge.fn.get()].needed);
        pending_[node].needed = needed;
      }
    }
  }

  void step(Node* node) {
    Pending& pending = pending_[node];
    TensorVec grads = std::move(pending.grads);
    grads.resize(std::max<size_t>(node->inputs.size(), 1));
    run_tensor_hooks(*node, grads);
    if (limited_) {
      if (const auto found = captures_.find(node); found != captures_.end()) {
        if (accumulate_ && node->is_leaf()) {
          call(*node, std::move(grads));
          return;
        }
        for (const CaptureAt& at : found->second) captured_[at.index] = grads[at.nr];
        bool any = false;
        for (const Edge& edge : node->edges) any |= edge.valid() && pending_[edge.fn.get()].needed;
        if (!any) {
          finish(*node, TensorVec(node->edges.size()));
          return;
        }
      } else if (!pending.needed) {
        finish(*node, TensorVec(node->edges.size()));
        return;
      }
    }
    bool any_grad = false;
    for (const Tensor& g : grads) any_grad |= g.defined();
    if (!any_grad) {
      finish(*node, TensorVec(node->edges.size()));
      return;
    }
    finish(*node, call(*node, std::move(grads)));
  }

  /// The hooks of the tensors that `node` made, or of the leaf that it stands for. They change what
  /// is captured; the node's own run only with the node.
  void run_tensor_hooks(Node& node, TensorVec& grads) {
    if (node.is_leaf()) static_cast<AccumulateGrad&>(node).call_hooks(grads[0]);
    if (!node.extras) return;
    // By value: a hook may remove itself, or register another.
    for (const auto& [nr, hook] : std::vector(node.extras->tensor_hooks)) {
      if (!grads[nr].defined()) continue;
      if (Tensor changed = hook->call(grads[nr]); changed.defined()) grads[nr] = std::move(changed);
    }
    for (const auto& [nr, impl] : node.extras->retain_grad) {
      if (!grads[nr].defined()) continue;
      Tensor& grad = impl->autograd->grad;
      grad = grad.defined()          ? ops::add(grad, grads[nr], Scalar(1))
             : options_.create_graph ? grads[nr]
                                     : ops::clone(grads[nr], std::nullopt);
    }
  }

  TensorVec call(Node& node, TensorVec grads) {
    const bool anomaly = thread_state.anomaly_enabled;
    if (node.extras) {
      for (const auto& hook : std::vector(node.extras->pre_hooks)) hook->call(grads, nullptr);
    }
    const TensorVec outputs_for_hooks =
        node.extras && !node.extras->post_hooks.empty() ? grads : TensorVec();
    TensorVec result;
    try {
      result = node.apply(std::move(grads));
    } catch (const Error& error) {
      if (!anomaly || (note_foreign_error && note_foreign_error(forward_note(node)))) throw;
      throw Error(error.kind(), error.message() + forward_note(node));
    }
    if (!options_.retain_graph) node.release_saved();
    if (node.extras) {
      for (const auto& hook : std::vector(node.extras->post_hooks))
        hook->call(result, &outputs_for_hooks);
    }
    check(result.size() >= node.edges.size() || result.empty(), "Function ", node.name(),
          " returned an incorrect number of gradients (expected ", node.edges.size(), ", got ",
          result.size(), ")");
    result.resize(node.edges.size());
    if (anomaly && thread_state.anomaly_check_nan) check_nan(node, result);
    return result;
  }

  static std::string forward_note(const Node& node) {
    if (!node.extras || node.extras->forward_trace.empty()) return {};
    return str("\nError detected in ", node.name(),
               ". Traceback of forward call that caused the error:\n", node.extras->forward_trace);
  }
  static void check_nan(const Node& node, const TensorVec& grads) {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !is_floating(grads[i].dtype())) continue;
      if (ops::any(ops::isnan(grads[i])).item().to_bool()) {
        fail("Function '", node.name(), "' returned nan values in its ", i, "th output.",
             forward_note(node));
      }
    }
  }

  /// Hands the gradients to the next nodes and queues those that are complete.
  void finish(Node& node, TensorVec grads) {
    for (size_t i = 0; i < node.edges.size(); ++i) {
      const Edge& edge = node.edges[i];
      if (!edge.valid()) continue;
      Node* next = edge.fn.get();
      Pending& pending = pending_[next];
      if (grads[i].defined() && pending.needed) {
        pending.grads.resize(std::max(pending.grads.size(), next->inputs.size()));
        accumulate(pending.grads[edge.nr], fit(std::move(grads[i]), *next, edge.nr));
      }
      if (--pending.missing == 0) ready_.push(next);
    }
  }

  const BackwardOptions options_;
  bool limited_ = false;
  bool accumulate_ = false;
  std::unordered_map<Node*, Pending> pending_;
  std::unordered_map<Node*, std::vector<CaptureAt>> captures_;
  std::unordered_map<Node*, bool> queued_;
  std::vector<Tensor> captured_;
  std::vector<Ref<Node>> keep_;
  std::priority_queue<Node*, std::vector<Node*>, Later> ready_;
};

/// Whether the innermost backward of this thread is for some inputs alone.
thread_local bool for_inputs = false;

struct DepthGuard {
  explicit DepthGuard(bool inputs) : outer(std::exchange(for_inputs, inputs)) { ++backward_depth; }
  ~DepthGuard() {
    --backward_depth;
    for_inputs = outer;
  }
  bool outer;
};

std::vector<Edge> root_edges(TensorSpan roots) {
  std::vector<Edge> edges;
  for (const Tensor& root : roots) {
    Edge edge = gradient_edge(root);
    check(edge.valid(), "element ", edges.size(),
          " of tensors does not require grad and does not have a grad_fn");
    edges.push_back(std::move(edge));
  }
  return edges;
}

std::vector<Tensor> root_gradients(TensorSpan roots, TensorSpan gradients) {
  std::vector<Tensor> out;
  for (size_t i = 0; i < roots.size(); ++i) {
    const Tensor& root = roots[i];
    if (i < gradients.size() && gradients[i].defined()) {
      const Tensor& grad = gradients[i];
      check(equal(grad.sizes(), root.sizes()), "Mismatch in shape: grad_output[", i,
            "] has a shape of ", grad.sizes(), " and output[", i, "] has a shape of ", root.sizes(),
            ".");
      out.push_back(grad);
      continue;
    }
    check(root.numel() == 1, "grad can be implicitly created only for scalar outputs");
    check(is_floating(root.dtype()),
          "grad can be implicitly created only for real scalar outputs but got ", root.dtype());
    out.push_back(ops::ones_like(root, std::nullopt, std::nullopt, std::nullopt));
  }
  return out;
}

std::vector<Edge> wanted_edges(TensorSpan inputs) {
  std::vector<Edge> wanted;
  for (const Tensor& input : inputs) {
    Edge edge = gradient_edge(input);
    check(edge.valid(), "One of the differentiated Tensors does not require grad");
    wanted.push_back(std::move(edge));
  }
  return wanted;
}

}  // namespace

bool in_backward_for_inputs() { return for_inputs; }

bool in_backward() { return backward_depth > 0; }

void backward(TensorSpan roots, TensorSpan gradients, TensorSpan inputs,
              const BackwardOptions& options) {
  const std::vector<Edge> edges = root_edges(roots);
  const std::vector<Tensor> grads = root_gradients(roots, gradients);
  const DepthGuard depth(!inputs.empty());
  GraphTask task(options);
  if (inputs.empty()) {
    task.run(edges, grads);
    return;
  }
  task.capture(wanted_edges(inputs), true);
  const std::vector<Tensor> found = task.run(edges, grads);
  const GradMode grad_mode(options.create_graph);
  for (size_t i = 0; i < inputs.size(); ++i) {
    // What retains its gradient has it already.
    if (!found[i].defined() || ensure_meta(inputs[i]).retains_grad) continue;
    // A copy: the gradient may be the caller's tensor, or another input's.
    Tensor& grad = ensure_meta(inputs[i]).grad;
    grad =
        grad.defined() ? ops::add(grad, found[i], Scalar(1)) : ops::clone(found[i], std::nullopt);
  }
}

std::vector<Tensor> grad(TensorSpan roots, TensorSpan gradients, TensorSpan inputs,
                         const BackwardOptions& options) {
  const std::vector<Edge> edges = root_edges(roots);
  const std::vector<Tensor> grads = root_gradients(roots, gradients);
  const DepthGuard depth(true);
  GraphTask task(options);
  task.capture(wanted_edges(inputs), false);
  std::vector<Tensor> found = task.run(edges, grads);
  for (const Tensor& g : found) {
    check(g.defined() || options.allow_unused,
          "One of the differentiated Tensors appears to not have been used in the graph. Set "
          "allow_unused=True if this is the desired behavior.");
  }
  return found;
}

}  // namespace vt::autograd
