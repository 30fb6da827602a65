// Pointwise ops that are a few others in a row.
#include "core/overlap.h"
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor number(double value) { return wrapped_scalar(Scalar(value)); }

Tensor as_float(const Tensor& t) {
  return is_floating(t.dtype()) ? t : ops::_to_dtype(t, default_dtype());
}

}  // namespace

Tensor positive(const Tensor& self) {
  check(self.dtype() != DType::Bool, "The `+` operator, on a bool tensor is not supported.");
  return self;
}
Tensor rsub(const Tensor& self, const Tensor& other, const Scalar& alpha) {
  return ops::sub(other, self, alpha);
}

Tensor div_mode(const Tensor& self, const Tensor& other,
                std::optional<std::string_view> rounding_mode) {
  if (!rounding_mode) return ops::div(self, other);
  if (*rounding_mode == "floor") return ops::floor_divide(self, other);
  check(*rounding_mode == "trunc",
        "div expected rounding_mode to be one of None, 'trunc', or 'floor' but found '",
        *rounding_mode, "'");
  return ops::_div_trunc(self, other);
}
Tensor div__mode(const Tensor& self, const Tensor& other,
                 std::optional<std::string_view> rounding_mode) {
  if (!rounding_mode) return ops::div_(self, other);
  return ops::copy_(self, div_mode(self, other, rounding_mode), false);
}

Tensor where(const Tensor& condition, const Tensor& self, const Tensor& other) {
  const Tensor* values[] = {&self, &other};
  const DType type = result_type(values);
  auto as = [type](const Tensor& t) {
    if (t.impl()->wrapped_number && !is_floating(type)) check_fits(t.item(), type);
    return t.dtype() == type ? t : ops::_to_dtype(t, type);
  };
  if (is_float8(type)) {  // half holds them exactly
    const auto half = [&](const Tensor& t) { return ops::_to_dtype(as(t), DType::Float16); };
    return ops::_to_dtype(ops::_where(condition, half(self), half(other)), type);
  }
  return ops::_where(condition, as(self), as(other));
}

Tensor clamp(const Tensor& self, const Tensor& min, const Tensor& max) {
  check(min.defined() || max.defined(),
        "torch.clamp: At least one of 'min' or 'max' must not be None");
  if (!max.defined()) return ops::_clamp_min(self, min);
  if (!min.defined()) return ops::_clamp_max(self, max);
  return ops::_clamp(self, min, max);
}
Tensor clamp_(const Tensor& self, const Tensor& min, const Tensor& max) {
  check(min.defined() || max.defined(),
        "torch.clamp: At least one of 'min' or 'max' must not be None");
  if (!max.defined()) return ops::_clamp_min_(self, min);
  if (!min.defined()) return ops::_clamp_max_(self, max);
  return ops::_clamp_(self, min, max);
}
Tensor clamp_min(const Tensor& self, const Tensor& min) { return ops::_clamp_min(self, min); }
Tensor clamp_max(const Tensor& self, const Tensor& max) { return ops::_clamp_max(self, max); }
Tensor clamp_min_(const Tensor& self, const Tensor& min) { return ops::_clamp_min_(self, min); }
Tensor clamp_max_(const Tensor& self, const Tensor& max) { return ops::_clamp_max_(self, max); }

Tensor masked_fill(const Tensor& self, const Tensor& mask, const Tensor& value) {
  Tensor out = self;
  if (!vt::equal(self.sizes(), mask.sizes()))
    out = ops::expand(self, broadcast_shapes(self.sizes(), mask.sizes()), false);
  return ops::masked_fill_(ops::clone(out, MemoryFormat::Contiguous), mask, value);
}

Tensor isclose(const Tensor& self, const Tensor& other, double rtol, double atol, bool equal_nan) {
  check(self.dtype() == other.dtype(), self.dtype(), " did not match ", other.dtype());
  check(rtol >= 0 && atol >= 0, "rtol and atol must be greater than or equal to zero, but got ",
        rtol, " and ", atol);
  Tensor close = ops::eq(self, other);
  if (equal_nan)
    close = ops::logical_or(close, ops::logical_and(ops::isnan(self), ops::isnan(other)));
  if (rtol == 0 && atol == 0) return close;
  const Tensor allowed = ops::add(ops::abs(ops::mul(other, number(rtol))), number(atol), Scalar(1));
  const Tensor error = ops::abs(ops::sub(as_float(self), as_float(other), Scalar(1)));
  return ops::logical_or(close, ops::logical_and(ops::isfinite(error), ops::le(error, allowed)));
}
bool allclose(const Tensor& self, const Tensor& other, double rtol, double atol, bool equal_nan) {
  return ops::all(ops::isclose(self, other, rtol, atol, equal_nan)).item().to_bool();
}
bool equal(const Tensor& self, const Tensor& other) {
  if (!vt::equal(self.sizes(), other.sizes())) return false;
  return self.numel() == 0 || ops::all(ops::eq(self, other)).item().to_bool();
}

Tensor fill(const Tensor& self, const Tensor& value) {
  return ops::fill_(ops::clone(self, std::nullopt), value);
}
Tensor zero_(const Tensor& self) { return ops::fill_(self, wrapped_scalar(Scalar(0))); }
Tensor contiguous(const Tensor& self, std::optional<MemoryFormat> memory_format) {
  const MemoryFormat format = memory_format.value_or(MemoryFormat::Contiguous);
  return self.is_contiguous(format) ? self : ops::clone(self, format);
}

Tensor selu(const Tensor& self) {
  return ops::elu(self, Scalar(1.6732632423543772), Scalar(1.0507009873554805), Scalar(1));
}
Tensor selu_(const Tensor& self) {
  return ops::elu_(self, Scalar(1.6732632423543772), Scalar(1.0507009873554805), Scalar(1));
}
Tensor celu(const Tensor& self, const Scalar& alpha) {
  check(alpha.to_double() != 0, "ZeroDivisionError: alpha cannot be 0 for CELU");
  return ops::elu(self, alpha, Scalar(1), Scalar(1.0 / alpha.to_double()));
}
Tensor relu6(const Tensor& self) { return ops::hardtanh(self, Scalar(0), Scalar(6)); }
Tensor hardsigmoid(const Tensor& self) {
  return ops::div(ops::relu6(ops::add(self, number(3.0), Scalar(1))), number(6.0));
}
Tensor hardswish(const Tensor& self) { return ops::mul(self, ops::hardsigmoid(self)); }
Tensor log_sigmoid(const Tensor& self) {
  return ops::neg(ops::softplus(ops::neg(self), Scalar(1), Scalar(1000.0)));
}
Tensor softsign(const Tensor& self) {
  return ops::div(self, ops::add(ops::abs(self), number(1.0), Scalar(1)));
}
Tensor tanhshrink(const Tensor& self) { return ops::sub(self, ops::tanh(self), Scalar(1)); }
Tensor prelu(const Tensor& self, const Tensor& weight) {
  Tensor w = weight;
  if (weight.numel() == 1) {
    w = ops::reshape(weight, Dims{});
  } else {
    const int64_t channels = self.dim() > 1 ? self.size(1) : self.dim() == 1 ? self.size(0) : 1;
    check(weight.dim() == 1 && weight.numel() == channels,
          "Mismatch of parameter numbers and input channel size. Found parameter numbers = ",
          weight.numel(), " and channel size = ", channels, ".");
    Dims shape(static_cast<size_t>(std::max<int64_t>(self.dim(), 1)), int64_t{1});
    shape[self.dim() > 1 ? 1 : 0] = channels;
    w = ops::reshape(weight, shape);
  }
  return ops::_where(ops::gt(self, number(0.0)), self, ops::mul(self, w));
}
Tensor glu(const Tensor& self, int64_t dim) {
  check(self.dim() > 0, "glu does not support 0-dimensional tensors");
  const int64_t size = self.size(dim);
  check(size % 2 == 0, "Halving dimension must be even, but dimension ", dim, " is size ", size);
  return ops::mul(ops::slice(self, dim, 0, size / 2, 1),
                  ops::sigmoid(ops::slice(self, dim, size / 2, size, 1)));
}
Tensor logit(const Tensor& self, std::optional<double> eps) {
  const Tensor in = as_float(self);  // masks have no differences
  const Tensor x = eps ? ops::clamp(in, number(*eps), number(1.0 - *eps)) : in;
  return ops::log(ops::div(x, ops::sub(number(1.0), x, Scalar(1))));
}

}  // namespace vt::composite
