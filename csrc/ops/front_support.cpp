#include "ops/front_support.h"

#include "core/random_rounding.h"
#include "vt/ops.h"

namespace vt {

void no_kernel(OpId id, Device device) {
  fail(ErrorKind::NotImplemented, op_name(id), ": no kernel for device '", device,
       "' in this build; move the tensor with .to('cpu'), or see `vibetensor info` for the "
       "backends");
}

void wrong_operand(Device device, const Tensor& tensor, std::string_view op,
                   std::string_view name) {
  if (tensor.device() == device) dtype_not_supported(tensor.dtype(), op);
  wrong_device(device, tensor, op, name);
}

void wrong_device(Device device, const Tensor& tensor, std::string_view op, std::string_view name) {
  fail(op, ": Expected all tensors to be on the same device, but found at least two devices, ",
       device, " and ", tensor.device(), "! Argument '", name, "' has shape ", tensor.sizes(),
       "; move it with .to('", device, "').");
}

Tensor WidenedFloat8::operator()(const Tensor& t) const {
  if (!is_float8(common)) return t.dtype() == common ? t : ops::_to_dtype(t, common);
  const Tensor narrow = t.dtype() == common ? t : ops::_to_dtype(t, common);
  return ops::_to_dtype(narrow, DType::Float16);
}

void refuse_bool_difference(const Tensor& self, const Tensor& other) {
  const bool a = self.dtype() == DType::Bool, b = other.dtype() == DType::Bool;
  check(!(a && b),
        "Subtraction, the `-` operator, with two bool tensors is not supported. Use the `^` or "
        "`logical_xor()` operator instead.");
  check(!a && !b,
        "Subtraction, the `-` operator, with a bool tensor is not supported. To invert a mask, use "
        "the `~` or `logical_not()` operator instead.");
}
void refuse_bool_negation(const Tensor& self) {
  check(self.dtype() != DType::Bool,
        "Negation, the `-` operator, on a bool tensor is not supported. To invert a mask, use the "
        "`~` or `logical_not()` operator instead.");
}

uint64_t rounding_counters(TensorSpan tensors) {
  int64_t chunks = 0;
  for (const Tensor& t : tensors) chunks += (t.numel() + kRoundedChunk - 1) / kRoundedChunk;
  return static_cast<uint64_t>(chunks * (kRoundedChunk / 2));
}

namespace autograd {

Tensor saved_before_write(const Tensor& self) { return ops::clone(self, std::nullopt); }

}  // namespace autograd
}  // namespace vt
