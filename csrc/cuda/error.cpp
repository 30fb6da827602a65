#include "cuda/error.h"

#include "cuda/failure.h"

namespace vt::cuda {
namespace {

/// After these no call works any more: the context is lost.
bool loses_context(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

std::string why_context_was_lost() {
  const std::string found = failed_check();
  return ". An earlier kernel failed, and the device cannot be used again in this process: " +
         (found.empty()
              ? "set VT_CUDA_LAUNCH_BLOCKING=1 to have the error reported at the op that failed"
              : found);
}

}  // namespace

void cuda_failed(cudaError_t error, std::string_view what) {
  // Errors that are not sticky must not surface again at an unrelated call.
  cudaGetLastError();
  std::string advice;
  if (loses_context(error))
    advice = why_context_was_lost();
  else if (error == cudaErrorNoKernelImageForDevice)
    advice = ". This build has no code for this GPU; `vibetensor info` lists what it was built for";
  if (error == cudaErrorMemoryAllocation) {
    fail(ErrorKind::OutOfMemory, "CUDA out of memory while ", what, " (", cudaGetErrorName(error),
         ")");
  }
  fail("CUDA error: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ") while ", what,
       advice);
}

const char* error_message(cudaError_t error) {
  if (!loses_context(error)) return cudaGetErrorString(error);
  // One kernel is the first to fail, so there is one text.
  static const std::string text =
      std::string("CUDA error: ") + cudaGetErrorString(error) + why_context_was_lost();
  return text.c_str();
}

}  // namespace vt::cuda
