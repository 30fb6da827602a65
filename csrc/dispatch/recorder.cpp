#include "dispatch/recorder.h"

namespace vt {

void Recorder::on_op(const OpCall& call, FunctionRef<void()> execute) {
  {
    // Kernels that call ops themselves are one op on the record.
    const Scoped<Consumer*> off(thread_state.consumer, nullptr);
    execute();
  }
  calls_.push_back(
      {call.id, {call.args.begin(), call.args.end()}, {call.outputs.begin(), call.outputs.end()}});
}

void Recorder::start() {
  check(thread_state.consumer == nullptr, "a recording is already active on this thread");
  thread_state.consumer = this;
  active_ = true;
}

void Recorder::stop() {
  check(active_ && thread_state.consumer == this, "this recorder is not active on this thread");
  thread_state.consumer = nullptr;
  active_ = false;
}

void Recorder::replay() const {
  const Scoped<Consumer*> off(thread_state.consumer, nullptr);
  for (const Call& call : calls_) execute_kernel(call.id, call.args, call.outputs);
}

}  // namespace vt
