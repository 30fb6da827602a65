// Checks and output shapes of softmax and the norms.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

Tensor softmax_output(const Tensor& self, int64_t dim, std::optional<DType> dtype,
                      std::string_view op) {
  wrap_dim(dim, self.dim());
  const DType result = dtype.value_or(self.dtype());
  if (!is_floating(result))
    fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for '", result, "'");
  return empty(self.sizes(), result, self.device());
}

/// Rows of the input that `normalized_shape` describes; checks weight and bias.
Dims check_norm(const Tensor& input, IntSpan shape, const Tensor& weight, const Tensor& bias,
                std::string_view op) {
  check(!shape.empty(),
        "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
        "element, "
        "but got normalized_shape = ",
        shape);
  const int64_t lead = input.dim() - static_cast<int64_t>(shape.size());
  bool fits = lead >= 0;
  for (size_t i = 0; fits && i < shape.size(); ++i)
    fits = input.sizes()[static_cast<size_t>(lead) + i] == shape[i];
  check(fits, "Given normalized_shape=", shape, ", expected input with shape [*, ", shape,
        "], but got input of size ", input.sizes());
  for (const Tensor* t : {&weight, &bias}) {
    if (!t->defined()) continue;
    check(std::equal(t->sizes().begin(), t->sizes().end(), shape.begin(), shape.end()), op,
          ": Expected weight and bias to be of same shape as normalized_shape, but got shape ",
          t->sizes(), " and normalized_shape = ", shape);
  }
  if (!is_floating(input.dtype()))
    fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for '", input.dtype(), "'");
  Dims stats(input.sizes().first(static_cast<size_t>(lead)));
  for (size_t i = 0; i < shape.size(); ++i) stats.push_back(1);
  return stats;
}
DType statistics_type(const Tensor& t) {
  return t.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}
Tensor like_or_none(const Tensor& t) {
  return t.defined() ? empty(t.sizes(), t.dtype(), t.device()) : Tensor();
}

}  // namespace

Tensor softmax(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return softmax_output(self, dim, dtype, "softmax_lastdim_kernel_impl");
}
Tensor log_softmax(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return softmax_output(self, dim, dtype, "log_softmax_lastdim_kernel_impl");
}
Tensor _softmax_backward(const Tensor&, const Tensor& output, int64_t, DType input_dtype) {
  return empty(output.sizes(), input_dtype, output.device());
}
Tensor _log_softmax_backward(const Tensor&, const Tensor& output, int64_t, DType input_dtype) {
  return empty(output.sizes(), input_dtype, output.device());
}

std::tuple<Tensor, Tensor, Tensor> native_layer_norm(const Tensor& input, IntSpan normalized_shape,
                                                     const Tensor& weight, const Tensor& bias,
                                                     double) {
  const Dims stats = check_norm(input, normalized_shape, weight, bias, "LayerNormKernelImpl");
  const DType type = statistics_type(input);
  return {empty(input.sizes(), input.dtype(), input.device()), empty(stats, type, input.device()),
          empty(stats, type, input.device())};
}
std::tuple<Tensor, Tensor, Tensor> native_layer_norm_backward(const Tensor&, const Tensor& input,
                                                              IntSpan, const Tensor&, const Tensor&,
                                                              const Tensor& weight,
                                                              const Tensor& bias) {
  return {empty(input.sizes(), input.dtype(), input.device()), like_or_none(weight),
          like_or_none(bias)};
}
std::tuple<Tensor, Tensor> _rms_norm(const Tensor& input, IntSpan normalized_shape,
                                     const Tensor& weight, double) {
  const Dims stats = check_norm(input, normalized_shape, weight, Tensor(), "rms_norm");
  return {empty(input.sizes(), input.dtype(), input.device()),
          empty(stats, statistics_type(input), input.device())};
}
std::tuple<Tensor, Tensor> _rms_norm_backward(const Tensor&, const Tensor& input, IntSpan,
                                              const Tensor&, const Tensor& weight) {
  return {empty(input.sizes(), input.dtype(), input.device()), like_or_none(weight)};
}

}  // namespace vt::meta
