// Norms: the public ops over the fused ones, and each fused op in plain ops for its second
// derivative.
#include "dispatch/thread_state.h"
#include "ops/composite/arithmetic.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

/// (1, C, 1, …): how a vector over channels meets (N, C, *).
Tensor per_channel(const Tensor& t, int64_t ndim) {
  if (!t.defined()) return t;
  Dims shape(static_cast<size_t>(ndim), 1);
  shape[1] = t.numel();
  return ops::view(t, shape);
}
Tensor affine(Tensor y, const Tensor& weight, const Tensor& bias) {
  if (weight.defined()) y = y * weight;
  if (bias.defined()) y = y + bias;
  return y;
}
Tensor widened(const Tensor& t) {
  return is_reduced_float(t.dtype()) ? ops::_to_dtype(t, DType::Float32) : t;
}
Tensor rounded(const Tensor& t, DType dtype) {
  return t.dtype() == dtype ? t : ops::_to_dtype(t, dtype);
}

}  // namespace

Tensor softmax_composite(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  const Tensor x = dtype ? rounded(self, *dtype) : self;
  if (x.dim() == 0) return ops::exp(x - x);
  const Tensor e = ops::exp(x - ops::detach(ops::amax(x, Dims{dim}, true)));
  return e / sum(e, Dims{dim}, true);
}

Tensor log_softmax_composite(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  const Tensor x = dtype ? rounded(self, *dtype) : self;
  if (x.dim() == 0) return x - x;
  const Tensor shifted = x - ops::detach(ops::amax(x, Dims{dim}, true));
  return shifted - ops::log(sum(ops::exp(shifted), Dims{dim}, true));
}

Tensor softmin(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return ops::softmax(-self, dim, dtype);
}

Tensor layer_norm(const Tensor& input, IntSpan normalized_shape, const Tensor& weight,
                  const Tensor& bias, double eps, bool) {
  return std::get<0>(ops::native_layer_norm(input, normalized_shape, weight, bias, eps));
}

std::tuple<Tensor, Tensor, Tensor> native_layer_norm_composite(const Tensor& input,
                                                               IntSpan normalized_shape,
                                                               const Tensor& weight,
                                                               const Tensor& bias, double eps) {
  const Dims dims = last_dims(input, normalized_shape.size());
  const Tensor x = widened(input);
  const Tensor centre = mean(x, dims, true);
  const Tensor deviation = x - centre;
  const Tensor rstd = ops::rsqrt(mean(deviation * deviation, dims, true) + eps);
  return {rounded(affine(deviation * rstd, weight, bias), input.dtype()), centre, rstd};
}

Tensor rms_norm(const Tensor& input, IntSpan normalized_shape, const Tensor& weight,
                std::optional<double> eps) {
  const double smallest = input.dtype() == DType::Float64    ? 0x1p-52
                          : input.dtype() == DType::BFloat16 ? 0x1p-7
                          : input.dtype() == DType::Float16  ? 0x1p-10
                                                             : 0x1p-23;
  return std::get<0>(ops::_rms_norm(input, normalized_shape, weight, eps.value_or(smallest)));
}

std::tuple<Tensor, Tensor> _rms_norm_composite(const Tensor& input, IntSpan normalized_shape,
                                               const Tensor& weight, double eps) {
  const Dims dims = last_dims(input, normalized_shape.size());
  const Tensor x = widened(input);
  const Tensor rstd = ops::rsqrt(mean(x * x, dims, true) + eps);
  return {rounded(affine(x * rstd, weight, Tensor()), input.dtype()), rstd};
}

Tensor group_norm(const Tensor& input, int64_t num_groups, const Tensor& weight, const Tensor& bias,
                  double eps, bool) {
  check(input.dim() >= 2, "Expected at least 2 dimensions for input tensor but received ",
        input.dim());
  const int64_t n = input.sizes()[0], c = input.sizes()[1];
  check(num_groups > 0, "Expected num groups to be greater than 0, got ", num_groups);
  check(
      c % num_groups == 0,
      "Expected number of channels in input to be divisible by num_groups, but got input of shape ",
      input.sizes(), " and num_groups=", num_groups);
  for (const Tensor* t : {&weight, &bias}) {
    check(!t->defined() || (t->dim() == 1 && t->numel() == c),
          "group_norm: Expected weight and bias to be vectors of size "
          "equal to the number of channels in input, but got shape ",
          t->defined() ? t->sizes() : IntSpan(), " and input of shape ", input.sizes());
  }
  if (input.numel() == 0)
    return rounded(affine(ops::clone(input, std::nullopt), per_channel(weight, input.dim()),
                          per_channel(bias, input.dim())),
                   input.dtype());
  const int64_t row = input.numel() / (n * num_groups);
  const Tensor rows = ops::reshape(input, Dims{n * num_groups, row});
  const Tensor y = std::get<0>(ops::native_layer_norm(rows, Dims{row}, Tensor(), Tensor(), eps));
  return rounded(affine(ops::view(y, input.sizes()), per_channel(weight, input.dim()),
                        per_channel(bias, input.dim())),
                 input.dtype());
}

Tensor batch_norm(const Tensor& input, const Tensor& weight, const Tensor& bias,
                  const Tensor& running_mean, const Tensor& running_var, bool training,
                  double momentum, double eps, bool) {
  // torch takes a vector of no elements as a batch of nothing.
  if (input.dim() == 1 && input.numel() == 0) return ops::clone(input, std::nullopt);
  check(input.dim() >= 2, "batch_norm: expected (N, C, *), got shape ", input.sizes());
  const int64_t c = input.sizes()[1], ndim = input.dim();
  const std::pair<const Tensor*, const char*> vectors[] = {{&weight, "weight"},
                                                           {&bias, "bias"},
                                                           {&running_mean, "running_mean"},
                                                           {&running_var, "running_var"}};
  for (const auto& [t, name] : vectors) {
    check(!t->defined() || t->numel() == c, name, " should contain ", c, " elements not ",
          t->defined() ? t->numel() : 0);
  }
  check(training || (running_mean.defined() && running_var.defined()),
        "Expected running_mean and running_var to be defined when training=False");
  const Tensor x = widened(input);
  if (!training) {
    const Tensor scale = ops::rsqrt(per_channel(running_var, ndim) + eps);
    const Tensor y = (x - per_channel(running_mean, ndim)) * scale;
    return rounded(affine(y, per_channel(weight, ndim), per_channel(bias, ndim)), input.dtype());
  }
  Dims dims;
  for (int64_t d = 0; d < ndim; ++d) {
    if (d != 1) dims.push_back(d);
  }
  const Tensor centre = mean(x, dims, true);
  const Tensor deviation = x - centre;
  const Tensor variance = mean(deviation * deviation, dims, true);
  // A batch of nothing has no statistics to follow.
  if (input.numel() > 0 && (running_mean.defined() || running_var.defined())) {
    const Scoped<bool> no_grad(thread_state.grad_enabled, false);
    const double n =
        static_cast<double>(input.numel()) / static_cast<double>(std::max<int64_t>(c, 1));
    const auto follow = [&](const Tensor& running, const Tensor& batch) {
      if (!running.defined()) return;
      const Tensor flat = ops::view(ops::detach(batch), Dims{c});
      ops::copy_(running, running * (1 - momentum) + flat * momentum, false);
    };
    follow(running_mean, centre);
    follow(running_var, ops::detach(variance) * (n > 1 ? n / (n - 1) : 1.0));
  }
  const Tensor y = deviation * ops::rsqrt(variance + eps);
  return rounded(affine(y, per_channel(weight, ndim), per_channel(bias, ndim)), input.dtype());
}

Tensor instance_norm(const Tensor& input, const Tensor& weight, const Tensor& bias,
                     const Tensor& running_mean, const Tensor& running_var, bool use_input_stats,
                     double momentum, double eps, bool cudnn_enabled) {
  check(input.dim() >= 3, "instance_norm: expected (N, C, *), got shape ", input.sizes());
  check(use_input_stats || (running_mean.defined() && running_var.defined()),
        "Expected running_mean and running_var to be defined when use_input_stats is false");
  const int64_t n = input.sizes()[0], c = input.sizes()[1];
  if (!use_input_stats) {
    return ops::batch_norm(input, weight, bias, running_mean, running_var, false, momentum, eps,
                           cudnn_enabled);
  }
  const Tensor y = ops::group_norm(input, c, weight, bias, eps, cudnn_enabled);
  if (!running_mean.defined() && !running_var.defined()) return y;
  // The running statistics follow the mean over the batch of each instance's.
  const Scoped<bool> no_grad(thread_state.grad_enabled, false);
  const int64_t row = n * c == 0 ? 0 : input.numel() / (n * c);
  const Tensor rows = widened(ops::reshape(ops::detach(input), Dims{n, c, row}));
  const auto follow = [&](const Tensor& running, const Tensor& instances) {
    if (!running.defined()) return;
    const Tensor batch = mean(instances, Dims{0}, false);
    ops::copy_(running, running * (1 - momentum) + batch * momentum, false);
  };
  follow(running_mean, mean(rows, Dims{2}, false));
  follow(running_var, ops::var_dim(rows, Dims{2}, true, false));
  return y;
}

}  // namespace vt::composite
