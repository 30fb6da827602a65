// The one point below autograd that every op passes with its id, arguments and inferred outputs.
// Off (no consumer on this thread) it costs one predictable branch and the kernel runs. A consumer
// (a recorder, capture mode) sees each op and decides whether and when its kernel runs.
#pragma once

#include <span>

#include "core/function_ref.h"
#include "dispatch/thread_state.h"
#include "dispatch/value.h"
#include "vt/op_ids.h"  // generated: enum class OpId, op_name()

namespace vt {

struct OpCall {
  OpId id;
  std::span<const Value> args;      // in schema order; a Generator appears as its PhiloxArgs
  std::span<const Tensor> outputs;  // inferred and allocated; for in-place ops the mutated tensors
};

class Consumer {
 public:
  virtual ~Consumer() = default;
  /// `execute` runs the op's kernel on exactly these outputs (a no-op for views).
  virtual void on_op(const OpCall& call, FunctionRef<void()> execute) = 0;
  /// Backward has set or added to the leaf's .grad, or the program reads or sets it.
  virtual void on_gradient(const Tensor& leaf) { (void)leaf; }
  /// The host is about to read the tensor's elements; `what` is the call that asked. May throw.
  virtual void on_host_read(const Tensor& tensor, const char* what) { (void)tensor, (void)what; }
  /// How many of the storage's references are the consumer's: those count as nobody's.
  virtual uint32_t references(const Storage& storage) const { return (void)storage, 0; }
};

/// True where this handle is all that reaches the tensor's bytes: they may be taken over.
inline bool sole_owner(const Tensor& t) {
  const Consumer* consumer = thread_state.consumer;
  return t.ref()->use_count() == 1 &&
         t.storage()->use_count() == 1 + (consumer ? consumer->references(*t.storage()) : 0);
}
/// What reads a tensor's elements into host values calls this first.
inline void host_read(const Tensor& tensor, const char* what) {
  if (thread_state.consumer) [[unlikely]]
    thread_state.consumer->on_host_read(tensor, what);
}

/// Runs the kernel of a recorded call again. Outputs must have the recorded geometry. Generated.
void execute_kernel(OpId id, std::span<const Value> args, std::span<const Tensor> outputs);
/// Calls an op's front (promotion, autograd, …) with boxed arguments. Generated.
Value call_op(OpId id, std::span<const Value> args);

}  // namespace vt
