// What the current thread has switched on. One small struct, read with one load on the hot path.
#pragma once

#include <cstdint>

#include "core/ref.h"

namespace vt {

class Consumer;

namespace autograd {
class SavedTensorHooks;
}

/// Bits of ThreadState::front: why the op front must leave its straight path.
enum FrontBit : uint8_t {
  kAutocastCpu = 1,
  kAutocastCuda = 2,
  kModes = 4,  // a wrapper layer is active on this thread
};

struct ThreadState {
  bool grad_enabled = true;
  bool inference_mode = false;
  uint8_t front = 0;
  uint8_t autocast_dtype[2] = {7, 6};  // DType per device type: CPU bfloat16, CUDA float16
  bool anomaly_enabled = false;
  bool anomaly_check_nan = true;
  Consumer* consumer = nullptr;  // capture or a recorder; null: kernels run at once
  autograd::SavedTensorHooks* saved_hooks = nullptr;  // innermost saved_tensors_hooks
};

#if defined(__GNUC__)
extern thread_local constinit ThreadState thread_state __attribute__((tls_model("initial-exec")));
#else
extern thread_local constinit ThreadState thread_state;
#endif

/// Sets a field for a scope.
template <class T>
class Scoped {
 public:
  Scoped(T& field, T value) : field_(field), old_(field) { field = value; }
  ~Scoped() { field_ = old_; }
  Scoped(const Scoped&) = delete;
  Scoped& operator=(const Scoped&) = delete;

 private:
  T& field_;
  T old_;
};
struct GradMode : Scoped<bool> {
  explicit GradMode(bool enabled) : Scoped(thread_state.grad_enabled, enabled) {}
};
struct NoGrad : GradMode {
  NoGrad() : GradMode(false) {}
};

}  // namespace vt
