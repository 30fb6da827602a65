#include "autograd/node.h"

#include <mutex>
#include <utility>

#include "autograd/front.h"
#include "autograd/gradient_observer.h"
#include "core/block_cache.h"
#include "core/host_wait.h"
#include "dispatch/consumer.h"
#include "vt/ops.h"

namespace vt::autograd {
namespace {

std::atomic<uint64_t> next_sequence{1};
std::atomic<int64_t> live_nodes{0};

/// Guards every AutogradMeta::accumulator: the weak link from a leaf to its AccumulateGrad.
std::mutex& accumulator_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

thread_local std::vector<Node*>* delete_queue = nullptr;
thread_local GradientObserver* observer_of_gradients = nullptr;

}  // namespace

GradientObserver* gradient_observer() { return observer_of_gradients; }
void set_gradient_observer(GradientObserver* observer) { observer_of_gradients = observer; }

Node::Node(uint64_t sequence) : sequence(sequence) {
  live_nodes.fetch_add(1, std::memory_order_relaxed);
}
Node::Node() : Node(next_sequence.fetch_add(1, std::memory_order_relaxed)) {}
Node::~Node() { live_nodes.fetch_sub(1, std::memory_order_relaxed); }
void* Node::operator new(size_t size) { return block_cache_allocate(size); }
void Node::operator delete(void* pointer, size_t size) noexcept {
  block_cache_release(pointer, size);
}
int64_t Node::live_count() { return live_nodes.load(std::memory_order_relaxed); }

void Node::destroy() {
  if (delete_queue) {
    delete_queue->push_back(this);
    return;
  }
  std::vector<Node*> queue{this};
  delete_queue = &queue;
  while (!queue.empty()) {
    Node* node = queue.back();
    queue.pop_back();
    delete node;
  }
  delete_queue = nullptr;
}

// Leaves run last: their sequence is the largest so that the ready queue prefers them as soon as
// they are ready, which frees their gradients early.
AccumulateGrad::AccumulateGrad(Tensor leaf) : Node(kLeafSequence), variable(std::move(leaf)) {
  add_input(variable);
}

void AccumulateGrad::destroy() {
  {
    const std::lock_guard lock(accumulator_mutex());
    AutogradMeta* meta = variable.impl()->autograd.get();
    const uint32_t refs = refs_.load(std::memory_order_acquire);
    if (refs > 1) {
      // Someone looked it up between the last release and here.
      refs_.fetch_sub(1, std::memory_order_acq_rel);
      return;
    }
    refs_.store(0, std::memory_order_release);
    if (meta && meta->accumulator == this) meta->accumulator = nullptr;
  }
  Node::destroy();
}

namespace {
std::mutex& owner_mutex() {
  static auto* const mutex = new std::mutex;  // hooks may outlive statics
  return *mutex;
}
}  // namespace

void Hook::with_owner(const std::function<void(void* owner)>& removal) {
  const std::lock_guard lock(owner_mutex());
  if (owner_) removal(owner_);
}
void Hook::set_owner(void* owner) {
  const std::lock_guard lock(owner_mutex());
  owner_ = owner;
}

Ref<Node> grad_accumulator(const Tensor& leaf) {
  AutogradMeta& meta = ensure_meta(leaf);
  const std::lock_guard lock(accumulator_mutex());
  if (meta.accumulator && meta.accumulator->use_count() > 0) return Ref<Node>(meta.accumulator);
  auto node = make_ref<AccumulateGrad>(leaf);
  meta.accumulator = node.get();
  return node;
}

void renew_accumulator(const Tensor& leaf) {
  const std::lock_guard lock(accumulator_mutex());
  if (AutogradMeta* meta = leaf.impl()->autograd.get()) meta->accumulator = nullptr;
}

std::vector<Ref<NodeHook>> accumulator_hooks(const AutogradMeta& meta) {
  const std::lock_guard lock(accumulator_mutex());
  std::vector<Ref<NodeHook>> found;
  if (!meta.accumulator || meta.accumulator->use_count() == 0 || !meta.accumulator->extras)
    return found;
  const NodeExtras& extras = *meta.accumulator->extras;
  found = extras.pre_hooks;
  found.insert(found.end(), extras.post_hooks.begin(), extras.post_hooks.end());
  return found;
}

void AccumulateGrad::call_hooks(Tensor& grad) {
  const AutogradMeta& meta = ensure_meta(variable);
  if (!grad.defined() || meta.hooks.empty()) return;
  for (const auto& hook : std::vector(meta.hooks)) {
    if (Tensor changed = hook->call(grad); changed.defined()) grad = std::move(changed);
  }
}

TensorVec AccumulateGrad::apply(TensorVec grads) {
  // It may have been told since that it takes none.
  if (!grads[0].defined() || !variable.impl()->requires_grad) return {};
  AutogradMeta& meta = ensure_meta(variable);
  {
    // Several threads may come here from graphs of their own.
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      const HostWait waiting;
      lock.lock();
    }
    accumulate(meta, std::move(grads[0]));
  }
  if (thread_state.consumer) [[unlikely]]
    thread_state.consumer->on_gradient(variable);
  if (!meta.post_accumulate_hooks.empty()) {
    for (const auto& hook : std::vector(meta.post_accumulate_hooks)) hook->call(variable);
  }
  return {};
}

void AccumulateGrad::accumulate(AutogradMeta& meta, Tensor grad) {
  if (GradientObserver* observer = gradient_observer()) [[unlikely]]
    observer->gradient_changes(variable, meta.grad);
  if (!meta.grad.defined()) {
    // A gradient nobody else holds is taken over; the layout then is the one it was computed in.
    const bool stealable = !thread_state.grad_enabled && sole_owner(grad) &&
                           (grad.is_contiguous() || equal(grad.strides(), variable.strides()));
    if (stealable) {
      meta.grad = std::move(grad);
    } else if (thread_state.grad_enabled) {
      meta.grad = ops::clone(grad, std::nullopt);
    } else {
      Tensor kept =
          empty_like(variable.is_non_overlapping_and_dense() ? variable : grad, grad.dtype());
      ops::copy_(kept, grad, false);
      meta.grad = std::move(kept);
    }
  } else if (thread_state.grad_enabled) {
    meta.grad = ops::add(meta.grad, grad, Scalar(1));
  } else {
    ops::add_(meta.grad, grad, Scalar(1));
  }
}

NodeExtras::~NodeExtras() {
  for (const auto& [nr, hook] : tensor_hooks) hook->set_owner(nullptr);
  for (const auto& hook : pre_hooks) hook->set_owner(nullptr);
  for (const auto& hook : post_hooks) hook->set_owner(nullptr);
}

AutogradMeta::~AutogradMeta() {
  drop_hooks();
  forget_retained();
}

void AutogradMeta::drop_hooks() {
  // Out of the lists first: what hooks hold may do anything as it ends.
  const auto dropped = std::exchange(hooks, {});
  const auto dropped_post = std::exchange(post_accumulate_hooks, {});
  for (const auto& hook : dropped) hook->set_owner(nullptr);
  for (const auto& hook : dropped_post) hook->set_owner(nullptr);
}

void AutogradMeta::forget_retained() {
  if (!retains_grad || !grad_fn || !grad_fn->extras) return;
  std::erase_if(grad_fn->extras->retain_grad,
                [this](const auto& entry) { return entry.second == owner; });
}

}  // namespace vt::autograd
