// Calls that are not stream work, made by a thread while it or another captures a stream.
#pragma once

#include <cuda_runtime_api.h>

namespace vt::cuda {

/// While it lives, calls of this thread that reserve memory, load code or destroy things go through
/// although a stream is being captured, and are no part of what is captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace vt::cuda
