// Products of 16-bit matrices whose rows do not begin at multiples of 16 bytes, or whose columns
// are no multiple of 8 (a vocabulary of 65 or 50257): the library has slow kernels for them only.
#pragma once

#include "cuda/cublaslt.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// The product through copies of the operands at fault, padded with zeros, and a padded result.
/// False, with nothing done, where the operands are aligned, the product is too small for the copies
/// to pay, or the library has no algorithm for it.
bool padded_product(const Launch& launch, const GemmProblem& product);

}  // namespace vt::cuda
