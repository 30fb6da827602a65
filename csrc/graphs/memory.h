// What a captured step gives out and relies on: results that keep their values, and tensors that
// must still be where they were.
#pragma once

#include <vector>

#include "autograd/meta.h"
#include "core/tensor.h"

namespace vt::graphs {

/// Memory that storages share.
class SharedBytes final : public RefCounted {
 public:
  SharedBytes(size_t nbytes, Device device);
  ~SharedBytes() override;
  /// As an allocation that holds a reference.
  Allocation share();

 private:
  Allocation allocation_;
};

/// A result buffer that every replay writes, lent to the user between replays. A loan that is still
/// held when the next replay comes keeps its bytes, and the buffer gets others: pointers that NumPy
/// and others took stay good. A device's graph has the addresses in it, so there the user gets a
/// copy, which the replay makes itself or which is made on the current stream after it.
class Loan {
 public:
  /// `base` is the program's storage; on the CPU its bytes are replaced. transfer: the number of
  /// the program's own copy of it (Program::copy_out); -1 if there is none.
  explicit Loan(Ref<Storage> base, int64_t transfer = -1);

  int64_t transfer() const { return transfer_; }
  /// Before a run that copies the buffer itself: where to.
  void* place();

  /// A tensor on the lent buffer, `byte_offset` from its start.
  Tensor tensor(int64_t byte_offset, DType dtype, IntSpan sizes, IntSpan strides);
  /// Call before a replay.
  void settle();

 private:
  void renew();
  Ref<Storage> copied() const;

  Ref<Storage> base_, lent_;
  Ref<SharedBytes> bytes_;
  size_t nbytes_;
  int64_t transfer_;
};

/// Tensors whose memory a captured step has bound.
class Guard {
 public:
  void add(const Tensor& tensor);
  /// False once one of them lies elsewhere (`.data` was set, a module was moved or cast), is
  /// trained and was not or the other way round, or has got other hooks. They are looked at only
  /// when some tensor of the process changed in such a way since it held last.
  bool holds();

 private:
  struct Bound {
    Ref<TensorImpl> impl;
    const Storage* storage;
    const void* data;
    Dims sizes, strides;
    int64_t offset;
    bool requires_grad;
    std::vector<Ref<autograd::TensorHook>> hooks;
    std::vector<Ref<autograd::PostAccumulateHook>> post_hooks;
    std::vector<Ref<autograd::NodeHook>> node_hooks;  // of its gradient's accumulation

    bool holds() const;
  };
  std::vector<Bound> bound_;
  uint64_t seen_ = 0;  // rebindings when it held last; 0 before
};

}  // namespace vt::graphs
