// What a captured step gives out and relies on: results that keep their values, and tensors that
// must still be where they were.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace vt::graphs {

/// A result buffer that every replay overwrites, lent to the user between replays. Before it is
/// overwritten, a loan that is still held moves to memory of its own, with its values.
class Loan {
 public:
  explicit Loan(Ref<Storage> base) : base_(std::move(base)) {}

  /// A tensor on the lent buffer, `byte_offset` from its start.
  Tensor tensor(int64_t byte_offset, DType dtype, IntSpan sizes, IntSpan strides);
  /// Call before a replay.
  void settle();

 private:
  Ref<Storage> base_, lent_;
};

/// Tensors whose memory a captured step has bound.
class Guard {
 public:
  void add(const Tensor& tensor);
  /// False once one of them lies elsewhere (`.data` was set, a module was moved or cast), or is
  /// trained and was not, or the other way round.
  bool holds() const;

 private:
  struct Bound {
    Ref<TensorImpl> impl;
    const Storage* storage;
    const void* data;
    bool requires_grad;
  };
  std::vector<Bound> bound_;
};

}  // namespace vt::graphs
