// Sums over batch and rows of (B, H, T, D) tensors, such as the gradients of attention's operands.
#pragma once

#include <optional>

#include "core/tensor.h"
#include "dispatch/kernels.h"

namespace vt {

/// A (B, H, T, D) tensor, and where its H * D sums go. None are made where that is undefined.
struct HeadSums {
  Tensor heads, sums;
};

/// Makes the sums by kernels.sum_dim, in `dtype` as that takes it. Tensors that lie side by side in
/// the rows of one matrix, and their sums so too, are one call: it costs what the matrix's sum
/// does, and has its bits.
void sum_head_rows(const KernelTable& kernels, std::span<const HeadSums> list,
                   std::optional<DType> dtype);

}  // namespace vt
