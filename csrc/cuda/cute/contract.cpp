#include "cuda/cute/contract.h"

#include <cstdlib>

#include "core/error.h"

namespace vt::cuda::cute {
namespace {

/// The bytes [begin, end) a tensor spans; empty for a null one. Strides are not negative by then.
struct Span {
  uintptr_t begin = 0, end = 0;
};

Span span_of(const Operand& t, const TensorRule& rule, const Call& call) {
  if (!t.data) return {};
  int64_t last = call.extents[rule.extents[rule.dims - 1]];
  for (int d = 0; d + 1 < rule.dims; ++d)
    last += (call.extents[rule.extents[d]] - 1) * t.strides[static_cast<size_t>(d)];
  const auto begin = reinterpret_cast<uintptr_t>(t.data);
  return {begin, begin + static_cast<uintptr_t>(last * item_size(rule.dtype))};
}

/// A dimension of more than one element, and what all faster ones span.
struct Step {
  int64_t extent, stride, inner;
};
/// From the fastest to the slowest, the dense last dimension left out.
struct Steps {
  std::array<Step, kMaxDims> at{};
  size_t count = 0;
  int64_t width = 0;  // of the last dimension
};

Steps steps_of(const Operand& t, const TensorRule& rule, const Call& call) {
  Steps steps;
  for (int d = 0; d + 1 < rule.dims; ++d) {
    const int64_t extent = call.extents[rule.extents[d]];
    if (extent <= 1) continue;
    const int64_t stride = t.strides[static_cast<size_t>(d)];
    size_t i = steps.count++;
    for (; i > 0 && steps.at[i - 1].stride > stride; --i) steps.at[i] = steps.at[i - 1];
    steps.at[i] = {extent, stride, 0};
  }
  steps.width = call.extents[rule.extents[rule.dims - 1]];
  int64_t inner = steps.width;
  for (size_t i = 0; i < steps.count; ++i) {
    steps.at[i].inner = inner;
    inner += (steps.at[i].extent - 1) * steps.at[i].stride;
  }
  return steps;
}

Reason check_tensor(const Operand& t, const TensorRule& rule, const Call& call) {
  if (!t.data) return rule.optional ? Reason::Fits : Reason::Missing;
  if (t.dtype != rule.dtype) return Reason::Dtype;
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(rule.align) != 0)
    return Reason::Alignment;
  for (int d = 0; d + 1 < rule.dims; ++d) {
    const int64_t stride = t.strides[static_cast<size_t>(d)];
    if (stride < 0 || stride % rule.stride_divisible_by != 0) return Reason::Stride;
  }
  // What is written must not lie on itself: whatever the order of the dimensions, a step in one is
  // at least as long as all that the faster ones span.
  if (rule.access == Access::Read) return Reason::Fits;
  const Steps steps = steps_of(t, rule, call);
  for (size_t i = 0; i < steps.count; ++i) {
    if (steps.at[i].stride < steps.at[i].inner) return Reason::Stride;
  }
  return Reason::Fits;
}

/// Whether an element of a tensor with these steps (that does not lie on itself) is `distance`
/// elements away from another of them. `step` counts down to the dense last dimension.
bool meets(const Steps& steps, size_t step, int64_t distance) {
  if (step == 0) return std::abs(distance) < steps.width;
  const Step& s = steps.at[step - 1];
  const int64_t whole = distance / s.stride;  // the rest is less than a step: one more may do
  for (const int64_t k : {whole - 1, whole, whole + 1}) {
    if (std::abs(k) < s.extent && meets(steps, step - 1, distance - k * s.stride)) return true;
  }
  return false;
}

/// Whether two tensors lie between each other without a common element, as slices of a tensor do.
bool interleaved(const Operand& a, const TensorRule& ra, const Operand& b, const TensorRule& rb,
                 const Call& call) {
  const auto size = static_cast<int64_t>(item_size(ra.dtype));
  const auto bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.data) -
                                          reinterpret_cast<uintptr_t>(b.data));
  if (ra.dims != rb.dims || static_cast<int64_t>(item_size(rb.dtype)) != size || bytes % size != 0)
    return false;
  for (int d = 0; d < ra.dims; ++d) {
    if (ra.extents[d] != rb.extents[d]) return false;
    if (d + 1 < ra.dims && a.strides[static_cast<size_t>(d)] != b.strides[static_cast<size_t>(d)])
      return false;
  }
  const Steps steps = steps_of(a, ra, call);
  return !meets(steps, steps.count, bytes / size);
}

bool same_place(const Operand& a, const TensorRule& ra, const Operand& b, const TensorRule& rb) {
  if (a.data != b.data || ra.dims != rb.dims || item_size(ra.dtype) != item_size(rb.dtype))
    return false;
  for (int d = 0; d < ra.dims; ++d) {
    if (ra.extents[d] != rb.extents[d]) return false;
    if (d + 1 < ra.dims && a.strides[static_cast<size_t>(d)] != b.strides[static_cast<size_t>(d)])
      return false;
  }
  return true;
}

}  // namespace

Refusal check_call(const ExtentRule* extents, const TensorRule* tensors, const Call& call) {
  for (size_t i = 0; i < call.extents.size(); ++i) {
    const int64_t value = call.extents[i];
    if (value < extents[i].minimum || value > extents[i].maximum)
      return {Reason::ExtentRange, static_cast<int>(i)};
    if (value % extents[i].divisible_by != 0) return {Reason::ExtentDivisor, static_cast<int>(i)};
  }
  const size_t count = call.tensors.size();
  for (size_t i = 0; i < count; ++i) {
    if (const Reason reason = check_tensor(call.tensors[i], tensors[i], call);
        reason != Reason::Fits)
      return {reason, static_cast<int>(i)};
  }
  for (size_t i = 0; i < count; ++i) {
    if (tensors[i].access == Access::Read) continue;
    const Span written = span_of(call.tensors[i], tensors[i], call);
    for (size_t k = 0; k < count; ++k) {
      if (k == i) continue;
      const Span other = span_of(call.tensors[k], tensors[k], call);
      if (written.begin >= other.end || other.begin >= written.end) continue;
      const bool allowed = (tensors[i].may_alias >> k & 1u) || (tensors[k].may_alias >> i & 1u);
      if (allowed && same_place(call.tensors[i], tensors[i], call.tensors[k], tensors[k])) continue;
      if (!interleaved(call.tensors[i], tensors[i], call.tensors[k], tensors[k], call))
        return {Reason::Overlap, static_cast<int>(i)};
    }
  }
  return {};
}

std::string describe(Refusal refusal, const ExtentRule* extents, const TensorRule* tensors,
                     const Call& call, std::span<const char* const> extent_names,
                     std::span<const char* const> tensor_names) {
  const auto at = static_cast<size_t>(refusal.which);
  switch (refusal.reason) {
    case Reason::Fits:
      return "it applies";
    case Reason::NotCompiled:
      return "it was not compiled into this library";
    case Reason::NotLoaded:
      return "its code could not be loaded on this device";
    case Reason::ExtentRange:
      return str(extent_names[at], " = ", call.extents[at], " is not from ", extents[at].minimum,
                 " to ", extents[at].maximum);
    case Reason::ExtentDivisor:
      return str(extent_names[at], " = ", call.extents[at], " is not a multiple of ",
                 extents[at].divisible_by);
    case Reason::Missing:
      return str(tensor_names[at], " is missing");
    case Reason::Dtype:
      return str(tensor_names[at], " is ", dtype_name(call.tensors[at].dtype), ", not ",
                 dtype_name(tensors[at].dtype));
    case Reason::Alignment:
      return str(tensor_names[at], " is not aligned to ", tensors[at].align, " bytes");
    case Reason::Stride:
      return str(tensor_names[at], " has rows that are ", call.tensors[at].strides[0],
                 " elements apart: not a multiple of ", tensors[at].stride_divisible_by,
                 ", or too close for what is written");
    case Reason::Overlap:
      return str(tensor_names[at], " shares memory with another argument");
  }
  return "";
}

}  // namespace vt::cuda::cute
