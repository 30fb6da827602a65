// A CUDA runtime without a device, linked in the place of NVIDIA's: work given to a stream runs
// when something waits for it, streams can be captured, and any call can be made to fail. Memory is
// the host's, so that sanitizers see what work touches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace vt::stub {

/// A kernel as its host stub and as the driver's handle of it. A launch copies the arguments.
struct Kernel {
  std::vector<size_t> argument_sizes;
  void (*run)(const std::vector<std::vector<std::byte>>& arguments);
};

using Work = std::function<void()>;
/// Gives work to a stream, as a kernel's launch does; a node where the stream is captured.
cudaError_t enqueue(cudaStream_t stream, Work work);
/// Runs all that was given to any stream.
void finish_all();
/// The n-th call of the runtime from now, counted from 1, fails; 0: none does.
void fail_call(int64_t n);
/// Whether the call that was to fail has been made.
bool has_failed();
/// How many devices there are, at first one and at most two; before anything asks.
void set_device_count(int count);
/// Memory of devices, and page-locked memory of the host, that has not been given back.
size_t memory_blocks();
size_t host_blocks();
/// What the driver says is the thread's context; at first the device's.
void set_context(uintptr_t context);
/// Launches asked of the driver so far: kernels, and graphs that it was handed.
int64_t kernel_launches();
int64_t graph_launches();
/// What is called as a kernel is loaded for its attributes.
void set_on_load(void (*function)());
/// Streams under capture, graphs and executables alive.
int captures();
int graphs();

}  // namespace vt::stub
