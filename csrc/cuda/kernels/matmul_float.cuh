// Products of float32 matrices on tensor cores, as exact as float32's own (tf32_split.cuh).
#pragma once

#include "cuda/cublaslt.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// c = alpha * a @ b + beta * c + bias. False where the kernel does not apply or the library's is
/// faster; nothing was written then. The bits are the same each time.
bool float_product(const Launch& launch, const GemmProblem& problem);

}  // namespace vt::cuda
