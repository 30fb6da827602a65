// Overrides and wrapper layers: user code that takes an op's call before autograd does.
// An override replaces one op; a mode sees every op on its thread. Unused, they cost one branch.
#pragma once

#include <atomic>

#include "dispatch/consumer.h"

namespace vt {

class Layer : public RefCounted {
 public:
  /// Returns the op's result. To run the original, call call_op() from inside: this layer is off
  /// for the duration of the call.
  virtual Value call(OpId id, std::span<const Value> args) = 0;
};

/// Installs (or with null removes) the override of one op, process-wide.
void set_override(OpId id, Ref<Layer> layer);
Ref<Layer> get_override(OpId id);
/// Makes every op of every thread a range of NVTX, with those it is made of inside, or no longer.
/// Returns whether they were.
bool mark_ops(bool marked);
/// Pushes a mode on this thread's stack of modes.
void push_mode(Ref<Layer> layer);
Ref<Layer> pop_mode();

extern std::atomic<bool> any_override;

/// True if the front must leave its straight path for a layer.
inline bool layers_active() {
  return (thread_state.front & kModes) != 0 || any_override.load(std::memory_order_relaxed);
}
/// Runs the innermost layer for this op; false if none applies.
bool call_layer(OpId id, std::span<const Value> args, Value& result);

}  // namespace vt
