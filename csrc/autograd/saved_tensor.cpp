#include "autograd/saved_tensor.h"

#include "autograd/front.h"
#include "autograd/view_nodes.h"

namespace vt::autograd {

void SavedTensor::save(const Tensor& tensor, bool is_output) {
  released_ = false;
  if (!tensor.defined()) return;
  check(!tensor.impl()->inference || is_output,
        "Inference tensors cannot be saved for backward. To work around you can make a clone to "
        "get a normal tensor and use it in autograd.");
  version_ = tensor.version();
  is_output_ = is_output;
  if (is_output) {
    const AutogradMeta* meta = tensor.impl()->autograd.get();
    output_nr_ = meta ? meta->output_nr : 0;
    requires_grad_ = true;
  }
  // Hooks see tensors only: a Python number among the operands stays what it is.
  if (thread_state.saved_hooks && !tensor.impl()->wrapped_number) [[unlikely]] {
    hooks_ = Ref<SavedTensorHooks>(thread_state.saved_hooks);
    const Scoped<SavedTensorHooks*> off(thread_state.saved_hooks, thread_state.saved_hooks->outer);
    if (!is_output && any_requires_grad(tensor)) edge_ = gradient_edge(tensor);
    packed_ = hooks_->pack(is_output ? alias(tensor) : tensor);
    if (packed_) return;
    hooks_.reset();
  }
  tensor_ = is_output ? alias(tensor) : tensor;
}

namespace {

/// The history of an output that its own node saved. A node that changed one view runs inside of
/// the node that changes the base, and what it made is a view of the base since.
void set_maker(AutogradMeta& meta, const Node* owner, uint32_t nr) {
  if (owner->extras && owner->extras->slices && owner->inputs.size() == 1) {
    meta.grad_fn = static_cast<CopySlices*>(owner->extras->slices)->view_after();
    meta.output_nr = 0;
  } else {
    meta.grad_fn = Ref<Node>(const_cast<Node*>(owner));
    meta.output_nr = nr;
  }
}

}  // namespace

Tensor SavedTensor::unpack(const Node* owner) const {
  if (released_) [[unlikely]] {
    fail(
        "Trying to backward through the graph a second time (or directly access saved tensors "
        "after "
        "they have already been freed). Saved intermediate values of the graph are freed when you "
        "call "
        ".backward() or autograd.grad(). Specify retain_graph=True if you need to backward through "
        "the "
        "graph a second time or if you need to access saved tensors after calling backward. (",
        owner ? owner->name() : std::string("saved tensor"), ")");
  }
  if (hooks_) [[unlikely]] {
    Tensor result = hooks_->unpack(packed_);
    if (is_output_ ? !owner : !edge_.valid()) return result;
    Tensor out = alias(result);
    AutogradMeta& meta = ensure_meta(out);
    if (is_output_) {
      set_maker(meta, owner, output_nr_);
    } else {
      meta.grad_fn = edge_.fn;
      meta.output_nr = edge_.nr;
    }
    return out;
  }
  if (!tensor_.defined()) return {};
  if (tensor_.version() != version_) [[unlikely]] {
    fail(
        "one of the variables needed for gradient computation has been modified by an inplace "
        "operation: [",
        tensor_.device().is_cpu() ? "vibetensor.FloatTensor " : "vibetensor.cuda.FloatTensor ",
        tensor_.sizes(), "] of dtype ", tensor_.dtype(), ", saved for ",
        owner ? owner->name() : std::string("backward"), ", is at version ", tensor_.version(),
        "; expected version ", version_,
        " instead. Hint: enable anomaly detection to find the operation "
        "that failed to compute its gradient, with torch.autograd.set_detect_anomaly(True).");
  }
  if (!is_output_ || !owner || !is_floating(tensor_.dtype())) return tensor_;
  Tensor out = alias(tensor_);
  AutogradMeta& meta = ensure_meta(out);
  set_maker(meta, owner, output_nr_);
  return out;
}

void SavedTensor::release() {
  tensor_.reset();
  packed_.reset();
  hooks_.reset();
  edge_ = {};
  released_ = true;
}

void SavedTensors::save(TensorSpan tensors) {
  released_ = false;
  tensors_.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) tensors_[i].save(tensors[i]);
}

std::vector<Tensor> SavedTensors::unpack(const Node* owner) const {
  std::vector<Tensor> out;
  out.reserve(tensors_.size());
  for (const SavedTensor& saved : tensors_) out.push_back(saved.unpack(owner));
  return out;
}

void SavedTensors::release() {
  for (SavedTensor& saved : tensors_) saved.release();
}

}  // namespace vt::autograd
