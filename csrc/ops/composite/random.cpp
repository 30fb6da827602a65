// Random factories and distributions over the in-place draws.
#include "dispatch/default_device.h"
#include "dispatch/thread_state.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor uninitialised(IntSpan size, std::optional<DType> dtype, std::optional<Device> device,
                     DType fallback) {
  return vt::empty(size, dtype.value_or(fallback), device.value_or(default_device()));
}
Tensor like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
            std::optional<MemoryFormat> format) {
  return ops::empty_like(self, dtype, device, format);
}

/// Deviations that the host can read must not be negative. A device's are not waited for, and a
/// recorded step reads them anew in each replay.
void check_deviations(const Tensor& std) {
  if (std.impl()->wrapped_number) {
    const double number = std.item().to_double();
    check(number >= 0, "normal expects std >= 0.0, but found std ", number);
  } else if (std.device().is_cpu() && !thread_state.consumer && std.numel() > 0) {
    const double least = ops::amin(std, {}, false).item().to_double();
    check(least >= 0, "normal expects all elements of std >= 0.0");
  }
}

/// One past the largest integer that `dtype` holds exactly, as torch's random_ uses it.
int64_t exact_limit(DType dtype) {
  switch (dtype) {
    case DType::Bool:
      return 2;
    case DType::UInt8:
      return 256;
    case DType::Int8:
      return 128;
    case DType::Int16:
      return 32768;
    case DType::Int32:
      return int64_t{1} << 31;
    case DType::Int64:
      return std::numeric_limits<int64_t>::max();
    case DType::Float16:
      return (int64_t{1} << 11) + 1;
    case DType::BFloat16:
      return (int64_t{1} << 8) + 1;
    case DType::Float32:
      return (int64_t{1} << 24) + 1;
    case DType::Float64:
      return (int64_t{1} << 53) + 1;
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      break;  // random_ refuses them
  }
  return 0;
}

Tensor draw_integers(const Tensor& self, int64_t low, int64_t high, const Generator& generator) {
  // Floats may round what they do not hold exactly, but must reach it.
  const double limit = self.dtype() == DType::Float16 ? 65504.0 : 0x1p63;
  const bool is_signed = self.dtype() != DType::Bool && self.dtype() != DType::UInt8;
  const double first = is_floating(self.dtype()) ? -limit
                       : is_signed               ? -static_cast<double>(exact_limit(self.dtype()))
                                                 : 0.0;
  const double last =
      is_floating(self.dtype()) ? limit : static_cast<double>(exact_limit(self.dtype()) - 1);
  check(static_cast<double>(low) >= first && static_cast<double>(low) <= last,
        "from is out of bounds for ", self.dtype(), ": ", low);
  check(high <= low || (static_cast<double>(high - 1) <= last), "to - 1 is out of bounds for ",
        self.dtype(), ": ", high - 1);
  return ops::_randint_(self, low, high, generator);
}

}  // namespace

Tensor rand(IntSpan size, const Generator& generator, std::optional<DType> dtype,
            std::optional<Device> device) {
  const NoGrad no_grad;
  return ops::uniform_(uninitialised(size, dtype, device, default_dtype()), 0.0, 1.0, generator);
}
Tensor randn(IntSpan size, const Generator& generator, std::optional<DType> dtype,
             std::optional<Device> device) {
  const NoGrad no_grad;
  return ops::normal_(uninitialised(size, dtype, device, default_dtype()), 0.0, 1.0, generator);
}
Tensor randint(int64_t high, IntSpan size, const Generator& generator, std::optional<DType> dtype,
               std::optional<Device> device) {
  return randint_low(0, high, size, generator, dtype, device);
}
Tensor randint_low(int64_t low, int64_t high, IntSpan size, const Generator& generator,
                   std::optional<DType> dtype, std::optional<Device> device) {
  return draw_integers(uninitialised(size, dtype, device, DType::Int64), low, high, generator);
}
Tensor randperm(int64_t n, const Generator& generator, std::optional<DType> dtype,
                std::optional<Device> device) {
  check(n >= 0, "n must be non-negative, got ", n);
  const DType type = dtype.value_or(DType::Int64);
  check(n <= exact_limit(type), "n is too large for ", type, ", which holds whole numbers below ",
        exact_limit(type), " exactly, got ", n);
  return ops::_randperm_(uninitialised(Dims{n}, dtype, device, DType::Int64), generator);
}
Tensor rand_like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
                 std::optional<MemoryFormat> format) {
  const NoGrad no_grad;
  return ops::uniform_(like(self, dtype, device, format), 0.0, 1.0, {});
}
Tensor randn_like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
                  std::optional<MemoryFormat> format) {
  const NoGrad no_grad;
  return ops::normal_(like(self, dtype, device, format), 0.0, 1.0, {});
}
Tensor randint_like(const Tensor& self, int64_t high, std::optional<DType> dtype,
                    std::optional<Device> device, std::optional<MemoryFormat> format) {
  return draw_integers(like(self, dtype, device, format), 0, high, {});
}
Tensor randint_like_low(const Tensor& self, int64_t low, int64_t high, std::optional<DType> dtype,
                        std::optional<Device> device, std::optional<MemoryFormat> format) {
  return draw_integers(like(self, dtype, device, format), low, high, {});
}

Tensor random_(const Tensor& self, const Generator& generator) {
  return draw_integers(self, 0, exact_limit(self.dtype()), generator);
}
Tensor random__to(const Tensor& self, int64_t to, const Generator& generator) {
  return draw_integers(self, 0, to, generator);
}
Tensor random__from(const Tensor& self, int64_t low, std::optional<int64_t> high,
                    const Generator& generator) {
  return draw_integers(self, low, high.value_or(exact_limit(self.dtype())), generator);
}

Tensor bernoulli(const Tensor& self, const Generator& generator) {
  const NoGrad no_grad;
  return ops::_bernoulli_tensor_(vt::empty_like(self), self, generator);
}
Tensor bernoulli_p(const Tensor& self, double p, const Generator& generator) {
  const NoGrad no_grad;
  return ops::_bernoulli_tensor_(vt::empty_like(self), wrapped_scalar(Scalar(p)), generator);
}
Tensor bernoulli_(const Tensor& self, const Tensor& p, const Generator& generator) {
  return ops::_bernoulli_tensor_(self, p, generator);
}

Tensor normal(const Tensor& mean, const Tensor& std, const Generator& generator) {
  const NoGrad no_grad;
  check_deviations(std);
  // The result is of the means' dtype.
  const Tensor deviation = std.impl()->wrapped_number || std.dtype() == mean.dtype()
                               ? std
                               : ops::_to_dtype(std, mean.dtype());
  const Tensor scaled = ops::add(mean, ops::mul(deviation, wrapped_scalar(Scalar(0.0))), Scalar(1));
  const Tensor noise =
      ops::normal_(vt::empty(scaled.sizes(), mean.dtype(), scaled.device()), 0.0, 1.0, generator);
  return ops::add(mean, ops::mul(deviation, noise), Scalar(1));
}
Tensor normal_std(double mean, const Tensor& std, const Generator& generator) {
  const NoGrad no_grad;
  check_deviations(std);
  const Tensor noise =
      ops::normal_(vt::empty(std.sizes(), std.dtype(), std.device()), 0.0, 1.0, generator);
  return ops::add(ops::mul(std, noise), wrapped_scalar(Scalar(mean)), Scalar(1));
}
Tensor normal_size(double mean, double std, IntSpan size, const Generator& generator,
                   std::optional<DType> dtype, std::optional<Device> device) {
  const NoGrad no_grad;
  return ops::normal_(uninitialised(size, dtype, device, default_dtype()), mean, std, generator);
}
Tensor multinomial(const Tensor& self, int64_t num_samples, bool replacement,
                   const Generator& generator) {
  const NoGrad no_grad;
  return ops::_multinomial(self, num_samples, replacement, generator);
}

Tensor dropout(const Tensor& self, double p, bool train) {
  check(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (!train || p == 0 || self.numel() == 0) return self;
  return std::get<0>(ops::native_dropout(self, p, true, {}));
}
Tensor dropout_(const Tensor& self, double p, bool train) {
  check(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (!train || p == 0 || self.numel() == 0) return self;
  const auto [out, mask] = ops::native_dropout(
      ops::ones_like(self, std::nullopt, std::nullopt, std::nullopt), p, true, {});
  return ops::mul_(self, out);
}

}  // namespace vt::composite
