// What the generated op fronts share.
#pragma once

#include "autograd/front.h"
#include "core/tensor_iterator.h"
#include "dispatch/autocast.h"
#include "dispatch/consumer.h"
#include "dispatch/kernels.h"
#include "dispatch/layers.h"
#include "vt/meta_decls.h"

namespace vt {

enum class DTypeClass : uint8_t { numeric, float_, integral, bits, float_or_int };
[[noreturn]] void no_kernel(OpId id, Device device);

/// Throws torch's `"op" not implemented for 'Bool'` unless `dtype` is of the class.
inline void check_compute_dtype(DType dtype, DTypeClass allowed, std::string_view op) {
  const bool ok = allowed == DTypeClass::numeric    ? dtype != DType::Bool
                  : allowed == DTypeClass::float_   ? is_floating(dtype)
                  : allowed == DTypeClass::integral ? is_integral(dtype)
                  : allowed == DTypeClass::bits     ? !is_floating(dtype)
                                                    : dtype != DType::Bool;
  if (!ok) [[unlikely]]
    dtype_not_supported(dtype, op);
}

/// Throw for a bool tensor, which has no difference and no negative, and name what a mask has.
void refuse_bool_difference(const Tensor& self, const Tensor& other);
void refuse_bool_negation(const Tensor& self);

/// A Python number; other tensors of 0 dimensions convert as tensors do, by wrapping.
inline void check_fits(const Tensor& value, DType dtype) {
  if (value.impl()->wrapped_number) check_fits(value.item(), dtype);
}

/// Throws unless `other` has the dtype of `self`; `number_free`: or has no dimensions.
inline void check_same_dtype(const Tensor& self, const Tensor& other, bool number_free,
                             std::string_view op, std::string_view name) {
  if (self.dtype() == other.dtype() || (number_free && other.dim() == 0)) [[likely]]
    return;
  fail(op, ": expected dtype ", self.dtype(), " for `", name, "` but got dtype ", other.dtype(),
       "; convert one with .to(dtype)");
}

inline Device first_device(TensorSpan tensors) {
  for (const Tensor& t : tensors) {
    if (t.defined()) return t.device();
  }
  return {};
}

[[noreturn]] void wrong_device(Device device, const Tensor& tensor, std::string_view op,
                               std::string_view name);
/// For ops that take 8-bit floats.
inline void check_on_device(Device device, const Tensor& t, std::string_view op,
                            std::string_view name) {
  if (t.defined() && !(t.device() == device)) [[unlikely]]
    wrong_device(device, t, op, name);
}
inline void check_on_device(Device device, TensorSpan ts, std::string_view op,
                            std::string_view name) {
  for (const Tensor& t : ts) check_on_device(device, t, op, name);
}
/// Throws for a tensor of another device, or of 8-bit floats.
[[noreturn]] void wrong_operand(Device device, const Tensor& tensor, std::string_view op,
                                std::string_view name);
inline void check_operand(Device device, const Tensor& t, std::string_view op,
                          std::string_view name) {
  if (t.defined() && (!(t.device() == device) || is_float8(t.dtype()))) [[unlikely]]
    wrong_operand(device, t, op, name);
}
inline void check_operand(Device device, TensorSpan ts, std::string_view op,
                          std::string_view name) {
  for (const Tensor& t : ts) check_operand(device, t, op, name);
}
inline void check_host_operand(Device device, const Tensor& t, std::string_view op,
                               std::string_view name) {
  if (t.defined() && t.dim() == 0 && t.device().is_cpu()) return;
  check_operand(device, t, op, name);
}
inline void check_host_operand(Device device, TensorSpan ts, std::string_view op,
                               std::string_view name) {
  for (const Tensor& t : ts) check_host_operand(device, t, op, name);
}
/// 8-bit floats have a result of their own only from ops that take them.
inline void check_result(const Tensor& t, std::string_view op) {
  if (t.defined() && is_float8(t.dtype())) [[unlikely]]
    dtype_not_supported(t.dtype(), op);
}
/// Operands of an op that computes with 8-bit floats as the 16-bit ones that hold them exactly.
struct WidenedFloat8 {
  DType common;
  explicit WidenedFloat8(std::initializer_list<const Tensor*> operands)
      : common(result_type({operands.begin(), operands.size()})) {}
  Tensor operator()(const Tensor& t) const;
};
inline bool any_float8(std::initializer_list<const Tensor*> operands) {
  bool any = false;
  for (const Tensor* t : operands) any |= is_float8(t->dtype());
  return any;
}
/// For arguments that may also be one number in host memory.
inline void check_host_scalar(Device device, const Tensor& t, std::string_view op,
                              std::string_view name) {
  if (t.defined() && t.dim() == 0 && t.device().is_cpu()) return;
  check_on_device(device, t, op, name);
}
inline void check_host_scalar(Device device, TensorSpan ts, std::string_view op,
                              std::string_view name) {
  for (const Tensor& t : ts) check_host_scalar(device, t, op, name);
}
/// Where a copy runs: on the accelerator, if one end is there.
inline Device copy_device(const Tensor& to, const Tensor& from) {
  return to.device().is_cpu() ? from.device() : to.device();
}

inline void collect_into(std::vector<Tensor>& out, const Tensor& t) { out.push_back(t); }
inline void collect_into(std::vector<Tensor>& out, TensorSpan ts) {
  out.insert(out.end(), ts.begin(), ts.end());
}
template <class... T>
std::vector<Tensor> collect(const T&... items) {
  std::vector<Tensor> out;
  (collect_into(out, items), ...);
  return out;
}

template <class... T>
Value box_tuple(const std::tuple<T...>& items) {
  return std::apply([](const auto&... parts) { return Value(std::vector<Tensor>{parts...}); },
                    items);
}

inline PhiloxArgs reserve_counters(const Generator& generator, Device device, uint64_t counters) {
  const Generator& source = generator ? generator : default_generator(device);
  check(source->device().type == device.type, "Expected a '", device,
        "' device type for generator but found '", source->device(), "'");
  if (counters > 0 && source != default_generator(device)) note_own_draw();
  return source->reserve(counters);
}

/// The counters that round elements of these tensors at random.
uint64_t rounding_counters(TensorSpan tensors);

namespace autograd {
/// The old value of a tensor about to be overwritten, for backward formulas that read it.
Tensor saved_before_write(const Tensor& self);
}  // namespace autograd

}  // namespace vt
