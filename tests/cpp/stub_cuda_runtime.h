// A CUDA runtime without a device, linked in the place of NVIDIA's: work given to a stream runs
// when something waits for it, streams can be captured, and any call can be made to fail. Memory is
// the host's, so that sanitizers see what work touches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

namespace vt::stub {

using Work = std::function<void()>;
/// Gives work to a stream, as a kernel's launch does; a node where the stream is captured.
cudaError_t enqueue(cudaStream_t stream, Work work);
/// Runs all that was given to any stream.
void finish_all();
/// The n-th call of the runtime from now, counted from 1, fails; 0: none does.
void fail_call(int64_t n);
/// Whether the call that was to fail has been made.
bool has_failed();
/// Streams under capture, graphs and executables alive.
int captures();
int graphs();

}  // namespace vt::stub
