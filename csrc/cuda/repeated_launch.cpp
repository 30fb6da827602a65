#include "cuda/repeated_launch.h"

#include <atomic>
#include <utility>

#include "core/environment.h"
#include "cuda/driver_function.h"
#include "cuda/relaxed_capture.h"
#include "cuda/sync.h"

namespace vt::cuda {
namespace {

/// The driver's functions.
struct Driver {
  decltype(&cuCtxGetCurrent) context = nullptr;
  decltype(&cuGraphCreate) create = nullptr;
  decltype(&cuGraphAddKernelNode) add = nullptr;
  decltype(&cuGraphInstantiateWithFlags) instantiate = nullptr;
  decltype(&cuGraphExecKernelNodeSetParams) set = nullptr;
  decltype(&cuGraphLaunch) launch = nullptr;
  decltype(&cuGraphExecDestroy) destroy_executable = nullptr;
  decltype(&cuGraphDestroy) destroy = nullptr;
  bool complete = true;

  Driver() {
    find(context, "cuCtxGetCurrent");
    find(create, "cuGraphCreate");
    find(add, "cuGraphAddKernelNode");
    find(instantiate, "cuGraphInstantiateWithFlags");
    find(set, "cuGraphExecKernelNodeSetParams");
    find(launch, "cuGraphLaunch");
    find(destroy_executable, "cuGraphExecDestroy");
    find(destroy, "cuGraphDestroy");
  }
  template <class F>
  void find(F& function, const char* name) {
    complete = find_driver_function(function, name) && complete;
  }
};
const Driver& driver() {
  static const Driver instance;
  return instance;
}

/// VT_CUDA_LAUNCH_GRAPHS=0 is for tools that show graphs and not the kernels in them. The driver
/// promises to wait for launches of kernels where it is told to, of graphs it says nothing.
const bool wanted =
    env_flag("VT_CUDA_LAUNCH_GRAPHS", true) && !env_flag("CUDA_LAUNCH_BLOCKING", false);

// Graphs, in a thread and in all: each holds 120 KB of the device's memory. A thread that has
// reached the limit begins anew, with the kernels that come often now.
constexpr int kMostOfThread = 256, kMost = 512;
std::atomic<int> alive{0};
struct Made {
  RepeatedLaunch* first = nullptr;
  int count = 0;
};
thread_local constinit Made made;

CUDA_KERNEL_NODE_PARAMS parameters(const KernelLaunch& kernel) {
  CUDA_KERNEL_NODE_PARAMS p{};
  p.func = kernel.function;
  p.gridDimX = kernel.grid.x;
  p.gridDimY = kernel.grid.y;
  p.gridDimZ = kernel.grid.z;
  p.blockDimX = kernel.block.x;
  p.blockDimY = kernel.block.y;
  p.blockDimZ = kernel.block.z;
  p.sharedMemBytes = kernel.shared_bytes;
  p.kernelParams = kernel.arguments;
  return p;
}

}  // namespace

int launch_graphs() { return alive.load(std::memory_order_relaxed); }

void RepeatedLaunch::begin() {
  reset();
  if (!wanted || launch_blocking || !driver().complete ||
      driver().context(&context_) != CUDA_SUCCESS)
    launches_ = kNever;
}

bool RepeatedLaunch::make(const KernelLaunch& kernel) {
  if (made.count >= kMostOfThread || alive.load(std::memory_order_relaxed) >= kMost) {
    reset_thread();
    launches_ = 0;
    return false;
  }
  const RelaxedCapture relaxed;  // others may be capturing
  const CUDA_KERNEL_NODE_PARAMS p = parameters(kernel);
  if (driver().create(&graph_, 0) != CUDA_SUCCESS) {
    graph_ = nullptr;
    launches_ = kNever;
    return false;
  }
  alive.fetch_add(1, std::memory_order_relaxed);
  ++made.count;
  next_ = std::exchange(made.first, this);
  if (driver().add(&node_, graph_, nullptr, 0, &p) == CUDA_SUCCESS &&
      driver().instantiate(&executable_, graph_, 0) == CUDA_SUCCESS)
    return true;
  executable_ = nullptr;
  reset();
  launches_ = kNever;
  return false;
}

bool RepeatedLaunch::launch_graph(const KernelLaunch& kernel) {
  // Without a context the driver's launch would crash, in another it would go to another stream.
  CUcontext current = nullptr;
  if (driver().context(&current) != CUDA_SUCCESS || current != context_) [[unlikely]]
    return false;
  if (!executable_ && !make(kernel)) [[unlikely]]
    return false;
  // Launches that are under way keep the arguments that they were given.
  const CUDA_KERNEL_NODE_PARAMS p = parameters(kernel);
  if (driver().set(executable_, node_, &p) == CUDA_SUCCESS &&
      driver().launch(executable_, nullptr) == CUDA_SUCCESS) [[likely]]
    return true;
  reset();
  return false;
}

void RepeatedLaunch::reset() {
  launches_ = 0;
  if (!graph_) return;
  const RelaxedCapture relaxed;
  // The driver keeps what still runs until it is done.
  if (executable_) driver().destroy_executable(executable_);
  driver().destroy(graph_);
  executable_ = nullptr;
  graph_ = nullptr;
  RepeatedLaunch** at = &made.first;
  while (*at != this) at = &(*at)->next_;
  *at = std::exchange(next_, nullptr);
  --made.count;
  alive.fetch_sub(1, std::memory_order_relaxed);
}

void RepeatedLaunch::reset_thread() {
  while (made.first) made.first->reset();
}

}  // namespace vt::cuda
