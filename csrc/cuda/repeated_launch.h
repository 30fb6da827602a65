// Launches of a kernel that a thread launches again and again on the default stream: as a graph of
// that one kernel, whose arguments are set anew each time. Of the host's time that takes 1.4 µs
// where the driver's own launch takes 3.0 (H200, driver 580); on the device it takes as long.
//
// Only on the default stream: others may be captured, which a launch of a graph cannot be part of.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/stream.h"

namespace vt::cuda {

/// A launch as the driver takes it. `arguments` point at the kernel's parameters, which are copied.
struct KernelLaunch {
  CUfunction function;
  dim3 grid, block;
  unsigned shared_bytes;
  void** arguments;
};

/// One kernel as one thread launches it on one device, of which it must not move to another. What
/// it holds is given back by reset() alone: the end of the process may no longer ask the driver.
class RepeatedLaunch {
 public:
  /// Whether the launch was made. It is not before the kernel has come often, on other streams, in
  /// other contexts, and where the driver refuses; the caller then launches as ever, and hears why.
  bool launch(const KernelLaunch& kernel, Stream stream) {
    if (stream.handle) return false;
    if (!executable_ && (launches_ == kNever || ++launches_ < kOften)) return false;
    return launch_graph(kernel);
  }
  /// For the kernel of the calling thread's context, from the start.
  void begin();
  /// Gives the graph back; launches under way go on. The kernel may come often again.
  void reset();
  /// All that the calling thread has.
  static void reset_thread();

 private:
  static constexpr int32_t kOften = 32;  // a graph takes 20 to 30 µs to make
  static constexpr int32_t kNever = -1;

  bool make(const KernelLaunch& kernel);
  bool launch_graph(const KernelLaunch& kernel);

  int32_t launches_ = 0;  // without a graph
  CUgraph graph_ = nullptr;
  CUgraphNode node_ = nullptr;
  CUgraphExec executable_ = nullptr;
  CUcontext context_ = nullptr;     // the kernel's; its default stream is the one meant
  RepeatedLaunch* next_ = nullptr;  // of the thread's that have graphs
};

/// Graphs of one kernel that there are now, in all threads.
int launch_graphs();

}  // namespace vt::cuda
