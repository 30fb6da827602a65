// Checks of the ops that write in place by index: they have no meta function, so what they will
// read is checked where they run.
#pragma once

#include <string_view>

#include "core/tensor.h"
#include "core/tensor_iterator.h"
#include "cuda/kernels/copy.cuh"

namespace vt::cuda {

/// Of index_add_ and index_copy_: `source` has a slice for each index.
inline void check_slices(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
                         std::string_view op) {
  check_index(index.dim() <= 1, op, ": Index should have dimension 1 or 0 (got ", index.dim(), ")");
  check(index.dtype() == DType::Int64 || index.dtype() == DType::Int32, op,
        ": Expected dtype int32/int64 for index, got ", index.dtype());
  check(self.dtype() == source.dtype(), op, ": self (", self.dtype(), ") and source (",
        source.dtype(), ") must have the same scalar type");
  Dims expected(self.sizes());
  if (!expected.empty()) expected[wrap_dim(dim, self.dim())] = index.numel();
  const bool fits = equal(source.sizes(), expected) ||
                    (self.dim() <= 1 && source.numel() == index.numel() && source.dim() <= 1);
  check_index(fits, op, ": source of shape ", source.sizes(), " does not fit self ", self.sizes(),
              " indexed by ", index.numel(), " positions along dimension ", dim, "; expected ",
              expected);
  check_no_internal_overlap(self);
}

/// Of the scatters, whose index has an entry for each element of `src`.
inline void check_elements(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                           std::string_view op) {
  check(index.dtype() == DType::Int64, op, "(): Expected dtype int64 for index, got ",
        index.dtype());
  check(self.dtype() == src.dtype(), op, "(): Expected self.dtype to be equal to src.dtype, got ",
        self.dtype(), " and ", src.dtype());
  check_no_internal_overlap(self);
  if (index.numel() == 0) return;
  check(index.dim() == self.dim() && index.dim() == src.dim(),
        "Index tensor must have the same number of dimensions as ",
        index.dim() == self.dim() ? "src" : "self", " tensor (", op, ": index ", index.sizes(),
        ", self ", self.sizes(), ", src ", src.sizes(), ")");
  const int64_t d = self.dim() == 0 ? 0 : wrap_dim(dim, self.dim());
  for (int64_t k = 0; k < index.dim(); ++k) {
    const int64_t extent = index.sizes()[k];
    check(extent <= src.sizes()[k] && (k == d || extent <= self.sizes()[k]), "Expected index ",
          index.sizes(), " to be no larger than self ", self.sizes(), " apart from dimension ", d,
          " and to be no larger size than src ", src.sizes());
  }
}

/// Calls `body(dense self)` and writes back if self was not dense.
template <class F>
void on_dense(const Tensor& self, F&& body) {
  const Tensor work = contiguous(self);
  body(work);
  if (!work.is_same(self)) copy(self, work, true);
}

}  // namespace vt::cuda
