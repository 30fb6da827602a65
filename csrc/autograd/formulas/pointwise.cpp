#include "autograd/formulas/pointwise.h"

#include <cmath>

#include "vt/ops.h"

namespace vt::autograd {
namespace {

Tensor number(double value) { return wrapped_scalar(Scalar(value)); }
Tensor plus(const Tensor& a, const Tensor& b) { return ops::add(a, b, Scalar(1)); }
Tensor minus(const Tensor& a, const Tensor& b) { return ops::sub(a, b, Scalar(1)); }

}  // namespace

Tensor wrapped_zero_like(const Tensor& like) { return ops::zeros({}, like.dtype(), like.device()); }

Tensor extremum_backward(const Tensor& grad, const Tensor& won, const Tensor& tied) {
  const Tensor half = ops::mul(grad, number(0.5));
  const Tensor zero = wrapped_zero_like(grad);
  return ops::_where(won, grad, ops::_where(tied, half, zero));
}

Tensor moved_to(const Tensor& grad, Device device) {
  if (grad.device() == device) return grad;
  return ops::copy_(empty(grad.sizes(), grad.dtype(), device), grad, false);
}

Tensor binary_cross_entropy_grad(const Tensor& grad, const Tensor& self, const Tensor& target) {
  const auto wide = [](const Tensor& t) {  // the smallest slope is no number of 16 bits
    return is_reduced_float(t.dtype()) ? ops::_to_dtype(t, DType::Float32) : t;
  };
  const Tensor p = wide(self);
  const Tensor spread = ops::_clamp_min(ops::mul(minus(number(1.0), p), p), number(1e-12));
  return ops::mul(wide(grad), ops::div(minus(p, wide(target)), spread));
}

Tensor pow_backward_self(const Tensor& grad, const Tensor& self, const Tensor& exponent) {
  if (exponent.dim() == 0 && exponent.impl()->wrapped_number) {
    const double e = exponent.item().to_double();
    if (e == 0) return ops::zeros_like(grad, std::nullopt, std::nullopt, std::nullopt);
    if (e == 2) return ops::mul(grad, ops::mul(self, number(2.0)));
    return ops::mul(grad, ops::mul(ops::pow(self, number(e - 1)), number(e)));
  }
  const Tensor slope = ops::mul(exponent, ops::pow(self, minus(exponent, number(1.0))));
  const Tensor product = ops::mul(grad, slope);
  return ops::_where(ops::eq(exponent, number(0.0)), wrapped_zero_like(product), product);
}

Tensor pow_backward_exponent(const Tensor& grad, const Tensor& self, const Tensor& exponent,
                             const Tensor& result) {
  // A Python number keeps its full precision until it meets a tensor.
  const Tensor log =
      self.impl()->wrapped_number ? number(std::log(self.item().to_double())) : ops::log(self);
  const Tensor product = ops::mul(grad, ops::mul(result, log));
  // 0 ** e does not move with e >= 0.
  const Tensor flat = ops::logical_and(ops::eq(self, number(0.0)), ops::ge(exponent, number(0.0)));
  return ops::_where(flat, wrapped_zero_like(product), product);
}

Tensor gelu_second_derivative(const Tensor& self, std::string_view approximate) {
  const Tensor square = ops::mul(self, self);
  if (approximate == "none") {
    // (2 - x^2) phi(x)
    const Tensor density =
        ops::mul(ops::exp(ops::mul(square, number(-0.5))), number(0.3989422804014327));
    return ops::mul(minus(number(2.0), square), density);
  }
  constexpr double kBeta = 0.7978845608028654, kKappa = 0.044715;
  const Tensor inner =
      ops::mul(plus(self, ops::mul(ops::mul(square, self), number(kKappa))), number(kBeta));
  const Tensor tanh = ops::tanh(inner);
  const Tensor slope =
      ops::mul(plus(ops::mul(square, number(3 * kKappa)), number(1.0)), number(kBeta));
  const Tensor sech2 = minus(number(1.0), ops::mul(tanh, tanh));
  // d2/dx2 of 0.5 x (1 + tanh u): sech2 u' + 0.5 x (sech2 u'' - 2 tanh sech2 u'^2)
  const Tensor bend = ops::mul(self, number(6 * kKappa * kBeta));
  const Tensor curve =
      minus(ops::mul(sech2, bend),
            ops::mul(ops::mul(ops::mul(tanh, sech2), ops::mul(slope, slope)), number(2.0)));
  return plus(ops::mul(sech2, slope), ops::mul(ops::mul(self, curve), number(0.5)));
}

Tensor silu_second_derivative(const Tensor& self) {
  const Tensor s = ops::sigmoid(self);
  const Tensor slope = ops::mul(s, minus(number(1.0), s));
  return ops::mul(slope,
                  plus(number(2.0), ops::mul(self, minus(number(1.0), ops::mul(s, number(2.0))))));
}

Tensor softplus_derivative(const Tensor& self, const Scalar& beta, const Scalar& threshold) {
  const Tensor scaled_input = ops::mul(self, wrapped_scalar(beta));
  const Tensor slope = ops::sigmoid(scaled_input);
  return ops::_where(ops::gt(scaled_input, wrapped_scalar(threshold)),
                     ops::ones_like(slope, std::nullopt, std::nullopt, std::nullopt), slope);
}

Tensor elu_backward(const Tensor& grad, const Tensor& self, const Scalar& alpha,
                    const Scalar& scale, const Scalar& input_scale) {
  const double a = alpha.to_double(), s = scale.to_double(), i = input_scale.to_double();
  // The exponent is clipped so that the branch not taken stays finite.
  const Tensor low = ops::mul(ops::exp(ops::mul(ops::_clamp_max(self, number(0.0)), number(i))),
                              number(a * s * i));
  return ops::mul(
      grad,
      ops::_where(
          ops::gt(self, number(0.0)),
          ops::mul(ops::ones_like(low, std::nullopt, std::nullopt, std::nullopt), number(s)), low));
}

Tensor mish_backward(const Tensor& grad, const Tensor& self) {
  const Tensor t = ops::tanh(ops::softplus(self, Scalar(1), Scalar(20)));
  const Tensor s = ops::sigmoid(self);
  return ops::mul(grad, plus(t, ops::mul(ops::mul(self, s), minus(number(1.0), ops::mul(t, t)))));
}

Tensor hardtanh_backward(const Tensor& grad, const Tensor& self, const Scalar& min_val,
                         const Scalar& max_val) {
  const Tensor inside = ops::logical_and(ops::gt(self, wrapped_scalar(min_val)),
                                         ops::lt(self, wrapped_scalar(max_val)));
  return ops::_where(inside, grad, wrapped_zero_like(grad));
}

}  // namespace vt::autograd
