// Checks and output shapes of the fused cross entropy.
#include "vt/meta_decls.h"

namespace vt::meta {

std::tuple<Tensor, Tensor, Tensor> _cross_entropy_index(const Tensor& self, const Tensor& target,
                                                        const Tensor& weight, int64_t reduction,
                                                        int64_t, double label_smoothing) {
  check(self.dim() == 2 && target.dim() == 1,
        "_cross_entropy_index: expected (N, C) logits and (N,) targets, got ", self.sizes(),
        " and ", target.sizes());
  const int64_t rows = self.sizes()[0], classes = self.sizes()[1];
  check_value(target.sizes()[0] == rows, "Expected input batch_size (", rows,
              ") to match target batch_size (", target.sizes()[0], ").");
  check(is_integral(target.dtype()), "expected scalar type Long but found ", target.dtype());
  if (!is_floating(self.dtype())) {
    fail(ErrorKind::NotImplemented, "\"log_softmax_lastdim_kernel_impl\" not implemented for '",
         self.dtype(), "'");
  }
  if (weight.defined()) {
    check(weight.dim() == 1 && weight.numel() == classes,
          "cross_entropy: weight tensor should be defined either for all ", classes,
          " classes or no classes but got weight tensor of shape: ", weight.sizes());
  }
  check(label_smoothing >= 0 && label_smoothing <= 1,
        "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  const DType type = self.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
  return {empty(reduction == 0 ? Dims{rows} : Dims{}, self.dtype(), self.device()),
          empty(Dims{rows}, type, self.device()), empty(Dims{}, type, self.device())};
}
Tensor _cross_entropy_index_backward(const Tensor&, const Tensor& self, const Tensor&,
                                     const Tensor&, int64_t, int64_t, double, const Tensor&,
                                     const Tensor&) {
  return empty(self.sizes(), self.dtype(), self.device());
}

}  // namespace vt::meta
