// Output shapes and dtypes of creation, copying and random ops.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {

Tensor clone(const Tensor& self, std::optional<MemoryFormat> memory_format) {
  if (!memory_format || *memory_format == MemoryFormat::Preserve) return empty_like(self);
  return empty(self.sizes(), self.dtype(), self.device(), *memory_format);
}

Tensor tril(const Tensor& self, int64_t) {
  check(self.dim() >= 2, "tril: input tensor must have at least 2 dimensions");
  return empty(self.sizes(), self.dtype(), self.device());
}
Tensor triu(const Tensor& self, int64_t) {
  check(self.dim() >= 2, "triu: input tensor must have at least 2 dimensions");
  return empty(self.sizes(), self.dtype(), self.device());
}

Tensor _where(const Tensor& condition, const Tensor& self, const Tensor& other) {
  check(condition.dtype() == DType::Bool,
        "where expected condition to be a boolean tensor, but got a tensor with dtype ",
        condition.dtype());
  const Tensor* all[] = {&condition, &self, &other};
  const Tensor* values[] = {&self, &other};
  const DType dtype = result_type(values);
  bool row_major = true;
  for (const Tensor* t : all) row_major &= t->is_contiguous();
  if (row_major) {
    const Device device = common_device(all, "where");
    return empty(broadcast_shapes(all, "where"), dtype, device);
  }
  // The layout of a pointwise result: that of what it is made from.
  Tensor out;
  Tensor* outs[] = {&out};
  TensorIterator it;
  it.build(outs, all, {.promote = Promote::None, .output_dtype = dtype, .op = "where"});
  return out;
}

Tensor _multinomial(const Tensor& self, int64_t num_samples, bool replacement, const Generator&) {
  check(self.dim() == 1 || self.dim() == 2, "prob_dist must be 1 or 2 dim");
  check(is_floating(self.dtype()),
        "multinomial only supports floating-point dtypes for input, got: ", self.dtype());
  check(num_samples > 0, "cannot sample n_sample <= 0 samples");
  check(replacement || num_samples <= self.size(-1),
        "cannot sample n_sample > prob_dist.size(-1) samples without replacement");
  Dims sizes(self.sizes());
  sizes.back() = num_samples;
  return empty(sizes, DType::Int64, self.device());
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool>,
                                          const Generator&) {
  check_value(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  check(is_floating(input.dtype()), "result type ", DType::Float32,
        " can't be cast to the desired output type ", input.dtype());
  return {empty_like(input, input.dtype()), empty_like(input, DType::Bool)};
}

Tensor _dropout_backward(const Tensor& grad_output, const Tensor&, double) {
  return empty(grad_output.sizes(), grad_output.dtype(), grad_output.device());
}

}  // namespace vt::meta
