// Which tensors share memory, so that in-place writes stay well defined.
#pragma once

#include "core/tensor.h"

namespace vt {

enum class Overlap : uint8_t { None, Partial, Full, Unknown };

/// Yes (an expanded dimension), no (dense), or unknown (odd strides, treated as no).
bool has_internal_overlap(const Tensor& t);
Overlap memory_overlap(const Tensor& a, const Tensor& b);

}  // namespace vt
