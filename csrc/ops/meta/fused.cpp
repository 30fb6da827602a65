// Checks and output shapes of the ops that the passes of capture mode make of several others. What
// they have in common with those is checked by the others' functions.
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

/// Where the sum of two tensors goes, of one shape or the second of the last dimensions of the
/// first, whole rows; undefined without a second one.
Tensor sum_of(const Tensor& self, const Tensor& residual, IntSpan normalized_shape,
              std::string_view op) {
  if (!residual.defined()) return {};
  IntSpan last = residual.sizes();
  while (last.size() > normalized_shape.size() && last.front() == 1) last = last.subspan(1);
  const IntSpan all = self.sizes();
  check(residual.dim() <= self.dim() && last.size() >= normalized_shape.size() &&
            std::equal(last.rbegin(), last.rend(), all.rbegin()),
        op,
        ": expected two tensors of one shape, or the second of the first's last dimensions, got ",
        self.sizes(), " and ", residual.sizes());
  return empty(self.sizes(), promote_types(self.dtype(), residual.dtype()), self.device());
}

Tensor as_float(const Tensor& like, DType dtype, std::string_view op) {
  check(is_floating(dtype), op, ": expected a floating dtype for the result, got ", dtype);
  return empty(like.sizes(), dtype, like.device());
}

/// Checks what is added to an input's gradient, and before to that of the result; the second copy
/// of the sum.
Tensor second_copy(const Tensor& residual, const Tensor& input, std::optional<DType> low,
                   TensorSpan terms, const Tensor& grad_output, std::string_view op) {
  if (!terms.empty()) {
    check(is_floating(grad_output.dtype()) && grad_output.itemsize() <= input.itemsize(), op,
          ": a sum of gradients is in the input's dtype ", input.dtype(), ", got ",
          grad_output.dtype());
  }
  for (const Tensor& term : terms) {
    check(is_floating(term.dtype()) && term.itemsize() <= input.itemsize() &&
              std::equal(input.sizes().begin(), input.sizes().end(), term.sizes().begin(),
                         term.sizes().end()),
          op, ": expected terms like the input, ", input.dtype(), " or narrower of shape ",
          input.sizes(), ", got ", term.dtype(), " of shape ", term.sizes());
  }
  if (residual.defined()) {
    check(residual.dtype() == input.dtype() &&
              std::equal(input.sizes().begin(), input.sizes().end(), residual.sizes().begin(),
                         residual.sizes().end()),
          op, ": expected a residual like the input, ", input.dtype(), " of shape ", input.sizes(),
          ", got ", residual.dtype(), " of shape ", residual.sizes());
  }
  return low ? as_float(input, *low, op) : Tensor();
}

/// Where the sums over rows go that are like `copy`, or else like `total`.
Tensor row_sums_of(const Tensor& total, const Tensor& copy, IntSpan normalized_shape, bool wanted) {
  if (!wanted) return {};
  return empty(normalized_shape, copy.defined() ? copy.dtype() : total.dtype(), total.device());
}

/// Where `parts` rows of an unfinished sum go, in the statistics' dtype; without parts, or without
/// a sum, that itself.
Tensor in_parts(const Tensor& sum, const Tensor& rstd, int64_t parts, std::string_view op) {
  check(parts >= 0, op, ": the number of parts must not be negative, got ", parts);
  if (parts == 0 || !sum.defined()) return sum;
  return empty(Dims{parts, sum.numel()}, rstd.dtype(), sum.device());
}

void check_activation(std::string_view activation, std::string_view op) {
  check(activation == "relu" || activation == "gelu" || activation == "gelu_tanh" ||
            activation == "silu",
        op, ": activation must be relu, gelu, gelu_tanh or silu, got '", activation, "'");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> _residual_layer_norm(
    const Tensor& self, const Tensor& residual, IntSpan normalized_shape, const Tensor& weight,
    const Tensor& bias, double eps, DType result_dtype) {
  const Tensor sum = sum_of(self, residual, normalized_shape, "_residual_layer_norm");
  auto [result, mean, rstd] =
      native_layer_norm(sum.defined() ? sum : self, normalized_shape, weight, bias, eps);
  return {as_float(result, result_dtype, "_residual_layer_norm"), sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> _residual_rms_norm(const Tensor& self, const Tensor& residual,
                                                      IntSpan normalized_shape,
                                                      const Tensor& weight, double eps,
                                                      DType result_dtype) {
  const Tensor sum = sum_of(self, residual, normalized_shape, "_residual_rms_norm");
  auto [result, rstd] = _rms_norm(sum.defined() ? sum : self, normalized_shape, weight, eps);
  return {as_float(result, result_dtype, "_residual_rms_norm"), sum, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> _residual_layer_norm_backward(
    const Tensor& grad_output, const Tensor& residual, const Tensor& input,
    IntSpan normalized_shape, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, std::optional<DType> low_dtype, TensorSpan terms, bool sums,
    int64_t parts) {
  auto [total, grad_weight, grad_bias] =
      native_layer_norm_backward(grad_output, input, normalized_shape, mean, rstd, weight, bias);
  constexpr std::string_view kOp = "_residual_layer_norm_backward";
  const Tensor low = second_copy(residual, input, low_dtype, terms, grad_output, kOp);
  const Tensor row_sums = row_sums_of(total, low, normalized_shape, sums);
  return {total, in_parts(grad_weight, rstd, parts, kOp), in_parts(grad_bias, rstd, parts, kOp),
          low, in_parts(row_sums, rstd, parts, kOp)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> _residual_rms_norm_backward(
    const Tensor& grad_output, const Tensor& residual, const Tensor& input,
    IntSpan normalized_shape, const Tensor& rstd, const Tensor& weight,
    std::optional<DType> low_dtype, TensorSpan terms, bool sums, int64_t parts) {
  auto [total, grad_weight] =
      _rms_norm_backward(grad_output, input, normalized_shape, rstd, weight);
  constexpr std::string_view kOp = "_residual_rms_norm_backward";
  const Tensor low = second_copy(residual, input, low_dtype, terms, grad_output, kOp);
  const Tensor row_sums = row_sums_of(total, low, normalized_shape, sums);
  return {total, in_parts(grad_weight, rstd, parts, kOp), low,
          in_parts(row_sums, rstd, parts, kOp)};
}

Tensor _row_parts(const Tensor& self, int64_t parts) {
  check((self.dim() == 2 || self.dim() == 3) && is_floating(self.dtype()) && self.itemsize() > 1,
        "_row_parts: expected a matrix, or a batch of them, of floats of 16 bits or more, got ",
        self.dtype(), " of shape ", self.sizes());
  check(parts > 0, "_row_parts: expected a positive number of parts, got ", parts);
  Dims sizes(self.sizes());
  sizes[sizes.size() - 2] = parts;
  return empty(sizes, self.dtype() == DType::Float64 ? DType::Float64 : DType::Float32,
               self.device());
}

std::tuple<Tensor, Tensor> _cross_entropy_index_gradient(
    const Tensor& self, const Tensor& target, const Tensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, const Tensor& grad_output, DType loss_dtype) {
  const auto [loss, lse, total] =
      _cross_entropy_index(self, target, weight, reduction, ignore_index, label_smoothing);
  check(grad_output.numel() == loss.numel(),
        "_cross_entropy_index_gradient: expected a gradient of shape ", loss.sizes(), ", got ",
        grad_output.sizes());
  return {as_float(loss, loss_dtype, "_cross_entropy_index_gradient"),
          empty(self.sizes(), self.dtype(), self.device())};
}

std::tuple<Tensor, Tensor> _linear_activation(const Tensor& input, const Tensor& weight,
                                              const Tensor& bias, std::string_view activation,
                                              bool keep) {
  check_activation(activation, "_linear_activation");
  const Tensor result = linear(input, weight, bias);
  check(is_floating(result.dtype()), "_linear_activation: expected floating tensors, got ",
        result.dtype());
  return {result, keep ? empty(result.sizes(), result.dtype(), result.device()) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> _mm_activation_backward(const Tensor& self, const Tensor& mat2,
                                                           const Tensor& saved,
                                                           std::string_view activation, bool sum,
                                                           bool again) {
  check_activation(activation, "_mm_activation_backward");
  const Tensor result = mm(self, mat2);
  check(is_floating(result.dtype()) && saved.dtype() == result.dtype() &&
            std::equal(saved.sizes().begin(), saved.sizes().end(), result.sizes().begin(),
                       result.sizes().end()),
        "_mm_activation_backward: expected ", result.dtype(), " of shape ", result.sizes(),
        " from the forward pass, got ", saved.dtype(), " of shape ", saved.sizes());
  return {result, sum ? empty(Dims{result.sizes()[1]}, result.dtype(), result.device()) : Tensor(),
          again ? empty(result.sizes(), result.dtype(), result.device()) : Tensor()};
}

std::tuple<Tensor, Tensor> _mm_row_sums(const Tensor& self, const Tensor& mat2) {
  const Tensor result = mm(self, mat2);
  check(is_floating(result.dtype()), "_mm_row_sums: expected floating tensors, got ",
        result.dtype());
  return {result, empty(Dims{self.sizes()[0]}, self.dtype(), self.device())};
}

std::tuple<Tensor, Tensor> _clip_coefficient(TensorSpan tensors, double ord, const Tensor&,
                                             const Tensor&, const Tensor&, DType result_dtype) {
  const Tensor norm = as_float(_multi_tensor_norm(tensors, ord), result_dtype, "_clip_coefficient");
  return {norm, empty(Dims{}, norm.dtype(), norm.device())};
}

}  // namespace vt::meta
