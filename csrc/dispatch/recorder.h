// The simplest consumer: runs every op as usual and keeps its call, so that the whole run can be
// executed again from the record alone. It holds every tensor it saw.
#pragma once

#include <vector>

#include "dispatch/consumer.h"

namespace vt {

class Recorder final : public Consumer, public RefCounted {
 public:
  struct Call {
    OpId id;
    std::vector<Value> args;
    std::vector<Tensor> outputs;
  };

  void on_op(const OpCall& call, FunctionRef<void()> execute) override;
  /// Installs the recorder on this thread; nested recorders are an error.
  void start();
  void stop();
  /// Runs every recorded kernel again, in order, on the same storages.
  void replay() const;
  const std::vector<Call>& calls() const { return calls_; }
  void clear() { calls_.clear(); }

 private:
  std::vector<Call> calls_;
  bool active_ = false;
};

}  // namespace vt
