#include "ops/front_support.h"

#include "vt/ops.h"

namespace vt {

void dtype_not_supported(DType dtype, std::string_view op) {
  constexpr std::string_view names[kNumDTypes] = {"Bool", "Byte", "Char",     "Short", "Int",
                                                  "Long", "Half", "BFloat16", "Float", "Double"};
  fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for '",
       names[static_cast<int>(dtype)], "'");
}

void no_kernel(OpId id, Device device) {
  fail(ErrorKind::NotImplemented, op_name(id), ": no kernel for device '", device,
       "' in this build; move the tensor with .to('cpu'), or see `vibetensor info` for the "
       "backends");
}

void wrong_device(Device device, const Tensor& tensor, std::string_view op, std::string_view name) {
  fail(op, ": Expected all tensors to be on the same device, but found at least two devices, ",
       device, " and ", tensor.device(), "! Argument '", name, "' has shape ", tensor.sizes(),
       "; move it with .to('", device, "').");
}

namespace autograd {

Tensor saved_before_write(const Tensor& self) { return ops::clone(self, std::nullopt); }

}  // namespace autograd
}  // namespace vt
