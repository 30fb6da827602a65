#include "cuda/error.h"

namespace vt::cuda {

void cuda_failed(cudaError_t error, std::string_view what) {
  // Errors that are not sticky must not surface again at an unrelated call.
  cudaGetLastError();
  std::string advice;
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
      advice =
          ". An earlier kernel failed, and the device cannot be used again in this process; "
          "set VT_CUDA_LAUNCH_BLOCKING=1 to have the error reported at the op that failed";
      break;
    case cudaErrorNoKernelImageForDevice:
      advice =
          ". This build has no code for this GPU; `vibetensor info` lists what it was built for";
      break;
    default:
      break;
  }
  if (error == cudaErrorMemoryAllocation) {
    fail(ErrorKind::OutOfMemory, "CUDA out of memory while ", what, " (", cudaGetErrorName(error),
         ")");
  }
  fail("CUDA error: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ") while ", what,
       advice);
}

}  // namespace vt::cuda
