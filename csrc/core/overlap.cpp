#include "core/overlap.h"

#include "core/tensor_iterator.h"

namespace vt {

bool has_internal_overlap(const Tensor& t) {
  if (t.is_contiguous()) return false;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.sizes()[i] > 1 && t.strides()[i] == 0) return true;
  }
  return false;
}

Overlap memory_overlap(const Tensor& a, const Tensor& b) {
  if (a.is_same(b)) return Overlap::Full;
  if (!(a.storage() == b.storage()) || a.numel() == 0 || b.numel() == 0) return Overlap::None;
  const int64_t item_a = a.itemsize(), item_b = b.itemsize();
  const int64_t begin_a = a.storage_offset() * item_a, begin_b = b.storage_offset() * item_b;
  const int64_t end_a = begin_a + span_elements(a.sizes(), a.strides()) * item_a;
  const int64_t end_b = begin_b + span_elements(b.sizes(), b.strides()) * item_b;
  if (begin_a >= end_b || begin_b >= end_a) return Overlap::None;
  if (begin_a == begin_b && a.dtype() == b.dtype() && equal(a.sizes(), b.sizes()) &&
      equal(a.strides(), b.strides())) {
    return Overlap::Full;
  }
  // Ranges that interleave (two columns of one matrix) need not touch; only dense ones must.
  if (a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense()) return Overlap::Partial;
  return Overlap::Unknown;
}

void check_no_internal_overlap(const Tensor& out) {
  if (has_internal_overlap(out)) [[unlikely]] {
    fail(
        "unsupported operation: more than one element of the written-to tensor refers to a single "
        "memory location (shape ",
        out.sizes(), ", strides ", out.strides(),
        "). Please clone() the tensor before performing the operation.");
  }
}

void check_no_partial_overlap(const Tensor& out, const Tensor& in) {
  if (memory_overlap(out, in) == Overlap::Partial) [[unlikely]] {
    fail(
        "unsupported operation: some elements of the input tensor and the written-to tensor refer "
        "to a single memory location (shapes ",
        in.sizes(), " and ", out.sizes(),
        "). Please clone() the tensor before performing the operation.");
  }
}

}  // namespace vt
