// A tensor kept for backward, with the version it had.
#pragma once

#include "autograd/node.h"

namespace vt::autograd {

/// The pair of functions of saved_tensors_hooks.
class SavedTensorHooks : public RefCounted {
 public:
  /// An opaque object in place of the tensor, and the way back.
  virtual Ref<RefCounted> pack(const Tensor& tensor) = 0;
  virtual Tensor unpack(const Ref<RefCounted>& packed) = 0;
  SavedTensorHooks* outer = nullptr;  // the enclosing pair while this one is active
};

class SavedTensor {
 public:
  SavedTensor() = default;
  /// Keeps `tensor`. An output of the node being built is kept without its history: the node must
  /// not own itself.
  void save(const Tensor& tensor, bool is_output = false);
  /// The tensor, after checking that nobody changed it in place. `owner` is the node that saved.
  Tensor unpack(const Node* owner) const;
  void release();
  bool released() const { return released_; }

 private:
  Tensor tensor_;
  uint32_t version_ = 0;
  uint32_t output_nr_ = 0;
  bool is_output_ = false;
  bool requires_grad_ = false;
  bool released_ = false;
  Ref<SavedTensorHooks> hooks_;
  Edge edge_;  // with hooks: where the packed tensor's gradient goes, which packing forgets
  Ref<RefCounted> packed_;
};

class SavedTensors {
 public:
  void save(TensorSpan tensors);
  std::vector<Tensor> unpack(const Node* owner) const;
  void release();

 private:
  std::vector<SavedTensor> tensors_;
  bool released_ = false;
};

}  // namespace vt::autograd
