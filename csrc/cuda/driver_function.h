// Functions of the driver that the runtime does not offer, found through the runtime.
#pragma once

#include <cuda_runtime_api.h>

namespace vt::cuda {

/// Points `function` to the driver's function of that name; false, and null, if the driver has
/// none.
template <class F>
bool find_driver_function(F& function, const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &address, CUDART_VERSION, cudaEnableDefault, &result);
  const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  if (!found) cudaGetLastError();
  function = found ? reinterpret_cast<F>(address) : nullptr;
  return found;
}

}  // namespace vt::cuda
