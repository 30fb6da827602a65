// CUDA calls that fail become vt::Error, with what was being done and the driver's name for it.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "core/error.h"

namespace vt::cuda {

[[noreturn]] void cuda_failed(cudaError_t error, std::string_view what);

/// Throws unless `error` is success. `what` says what was tried ("copying 12 bytes to the host").
inline void check_cuda(cudaError_t error, std::string_view what) {
  if (error != cudaSuccess) [[unlikely]]
    cuda_failed(error, what);
}

/// The driver's text, and where the context is lost what lost it. Lives as long as the process.
const char* error_message(cudaError_t error);

}  // namespace vt::cuda
