// conv1d to conv3d, their transposed forms, and pools: checks and biases around convolution.h.
#include "ops/composite/arithmetic.h"
#include "ops/composite/convolution.h"
#include "ops/meta/windows.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

Dims per_dimension(IntSpan values, size_t rank, const char* name) {
  meta::check_per_dimension(values, rank, name);
  Dims out;
  for (size_t i = 0; i < rank; ++i) out.push_back(meta::at(values, i));
  return out;
}
/// A 1-d setting as the 2-d one of a plane with a single row.
Dims row_pair(IntSpan values, int64_t first, const char* name) {
  meta::check_per_dimension(values, 1, name);
  return {first, values[0]};
}

Tensor with_bias(const Tensor& out, const Tensor& bias) {
  if (!bias.defined()) return out;
  Dims shape(static_cast<size_t>(out.dim() - 1), 1);
  shape[0] = bias.numel();
  return out + ops::view(bias, shape);
}

void check_conv(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t groups,
                int64_t in_channels, int64_t out_channels, std::string_view op) {
  check(input.dim() == weight.dim() || input.dim() == weight.dim() - 1, op,
        ": expected input (N, C, …) or (C, …) and weight with as "
        "many dimensions as batched input, got ",
        input.sizes(), " and ", weight.sizes());
  check(groups > 0, "non-positive groups is not supported");
  check(out_channels >= groups, "Given groups=", groups, ", expected weight to be at least ",
        groups, " at dimension 0, but got weight of size ", weight.sizes(), " instead");
  check(out_channels % groups == 0, "Given groups=", groups,
        ", expected weight to be divisible by ", groups, " at dimension 0, but got weight of size ",
        weight.sizes(), " instead");
  const int64_t channels = input.size(1 - weight.dim());
  check(channels == in_channels, "Given groups=", groups, ", weight of size ", weight.sizes(),
        ", expected input", input.sizes(), " to have ", in_channels, " channels, but got ",
        channels, " channels instead");
  check(!bias.defined() || (bias.dim() == 1 && bias.numel() == out_channels),
        "Given weight of size ", weight.sizes(), ", expected bias to be 1-dimensional with ",
        out_channels, " elements, but got bias of size ", bias.defined() ? bias.sizes() : IntSpan(),
        " instead");
  check(!bias.defined() || bias.dtype() == weight.dtype(), op, ": weight type (", weight.dtype(),
        ") and bias type (", bias.defined() ? bias.dtype() : weight.dtype(),
        ") should be the same");
  check(input.dtype() == weight.dtype(), "Input type (", input.dtype(), ") and weight type (",
        weight.dtype(), ") should be the same");
}

/// What every convolution asks of its windows, forward and transposed.
void check_windows(const Tensor& input, IntSpan kernel, const ConvolutionWindow& w) {
  for (size_t i = 0; i < kernel.size(); ++i) {
    check(w.padding[i] >= 0, "negative padding is not supported");
    check(w.stride[i] > 0, "non-positive stride is not supported");
    check(w.dilation[i] > 0, "dilation should be greater than zero");
    check(kernel[i] > 0, "kernel size should be greater than zero, but got shape ", kernel);
    check(input.sizes()[2 + i] > 0,
          "Only zero batch or zero channel inputs are supported, but got input shape: ",
          input.sizes());
  }
}

Tensor conv_nd(size_t rank, const Tensor& input, const Tensor& weight, const Tensor& bias,
               IntSpan stride, IntSpan padding, IntSpan dilation, int64_t groups,
               std::string_view op) {
  check(weight.dim() == static_cast<int64_t>(rank) + 2, op, ": expected weight ",
        rank == 2 ? "(O, C / groups, kh, kw)" : "(O, C / groups, kd, kh, kw)", ", got ",
        weight.sizes());
  const auto k = weight.sizes();
  check_conv(input, weight, bias, groups, k[1] * groups, k[0], op);
  if (input.dim() == static_cast<int64_t>(rank) + 1) {
    return ops::squeeze_dim(conv_nd(rank, ops::unsqueeze(input, 0), weight, bias, stride, padding,
                                    dilation, groups, op),
                            Dims{0});
  }
  const ConvolutionWindow w{per_dimension(stride, rank, "stride"),
                            per_dimension(padding, rank, "padding"),
                            per_dimension(dilation, rank, "dilation"), groups};
  check_windows(input, k.last(rank), w);
  Dims padded, reach;
  bool fits = true;
  for (size_t i = 0; i < rank; ++i) {
    padded.push_back(input.sizes()[2 + i] + 2 * w.padding[i]);
    reach.push_back(w.dilation[i] * (k[2 + i] - 1) + 1);
    fits = fits && padded[i] >= reach[i];
  }
  check(fits, "Calculated padded input size per channel: ", padded, ". Kernel size: ", reach,
        ". Kernel size can't be greater than actual input size");
  return with_bias(convolution(input, weight, w), bias);
}

}  // namespace

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, IntSpan stride,
              IntSpan padding, IntSpan dilation, int64_t groups) {
  return conv_nd(2, input, weight, bias, stride, padding, dilation, groups, "conv2d");
}

Tensor conv3d(const Tensor& input, const Tensor& weight, const Tensor& bias, IntSpan stride,
              IntSpan padding, IntSpan dilation, int64_t groups) {
  return conv_nd(3, input, weight, bias, stride, padding, dilation, groups, "conv3d");
}

Tensor conv1d(const Tensor& input, const Tensor& weight, const Tensor& bias, IntSpan stride,
              IntSpan padding, IntSpan dilation, int64_t groups) {
  check(weight.dim() == 3 && (input.dim() == 2 || input.dim() == 3),
        "Expected 2D (unbatched) or 3D (batched) input to conv1d, "
        "but got input of size: ",
        input.sizes(), " and weight of size: ", weight.sizes());
  const Tensor out = ops::conv2d(ops::unsqueeze(input, -2), ops::unsqueeze(weight, -2), bias,
                                 row_pair(stride, 1, "stride"), row_pair(padding, 0, "padding"),
                                 row_pair(dilation, 1, "dilation"), groups);
  return ops::squeeze_dim(out, Dims{-2});
}

Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const Tensor& bias,
                        IntSpan stride, IntSpan padding, IntSpan output_padding, int64_t groups,
                        IntSpan dilation) {
  check(weight.dim() == 4, "conv_transpose2d: expected weight (C, O / groups, kh, kw), got ",
        weight.sizes());
  const auto w = weight.sizes();
  check_conv(input, weight, bias, groups, w[0], w[1] * groups, "conv_transpose2d");
  if (input.dim() == 3) {
    return ops::squeeze_dim(ops::conv_transpose2d(ops::unsqueeze(input, 0), weight, bias, stride,
                                                  padding, output_padding, groups, dilation),
                            Dims{0});
  }
  const Dims s = per_dimension(stride, 2, "stride"), p = per_dimension(padding, 2, "padding"),
             d = per_dimension(dilation, 2, "dilation"),
             extra = per_dimension(output_padding, 2, "output_padding"), kernel{w[2], w[3]};
  check_windows(input, kernel, {s, p, d, groups});
  Dims size{0, 0};
  for (size_t i = 0; i < 2; ++i) {
    check(extra[i] < s[i] || extra[i] < d[i],
          "output padding must be smaller than either stride or dilation, but got "
          "output_padding=",
          extra, ", stride=", s, ", dilation=", d);
    size[i] = (input.sizes()[2 + i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + extra[i] + 1;
    check(size[i] > 0, "conv_transpose2d: calculated output size ", size[i], " is too small");
  }
  if (extra[0] < s[0] && extra[1] < s[1]) {
    const Dims whole{input.sizes()[0], w[1] * groups, size[0], size[1]};
    return with_bias(convolution_input_grad(input, weight, whole, {s, p, d, groups}), bias);
  }
  // So much output padding has room for another window, which has no gradient: the sums are made
  // without padding, which is cut off (or grown) afterwards.
  Dims full{input.sizes()[0], w[1] * groups, 0, 0}, border;
  for (size_t i = 0; i < 2; ++i)
    full[2 + i] = (input.sizes()[2 + i] - 1) * s[i] + d[i] * (kernel[i] - 1) + 1;
  for (const size_t i : {size_t{1}, size_t{0}}) {
    border.push_back(-p[i]);
    border.push_back(extra[i] - p[i]);
  }
  const Tensor whole = convolution_input_grad(input, weight, full, {s, Dims{0, 0}, d, groups});
  return with_bias(ops::constant_pad_nd(whole, border, Scalar(0)), bias);
}

Tensor conv_transpose1d(const Tensor& input, const Tensor& weight, const Tensor& bias,
                        IntSpan stride, IntSpan padding, IntSpan output_padding, int64_t groups,
                        IntSpan dilation) {
  const Tensor out = ops::conv_transpose2d(
      ops::unsqueeze(input, -2), ops::unsqueeze(weight, -2), bias, row_pair(stride, 1, "stride"),
      row_pair(padding, 0, "padding"), row_pair(output_padding, 0, "output_padding"), groups,
      row_pair(dilation, 1, "dilation"));
  return ops::squeeze_dim(out, Dims{-2});
}

Tensor max_pool2d(const Tensor& self, IntSpan kernel_size, IntSpan stride, IntSpan padding,
                  IntSpan dilation, bool ceil_mode) {
  return std::get<0>(
      ops::max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode));
}
Tensor max_pool1d(const Tensor& self, IntSpan kernel_size, IntSpan stride, IntSpan padding,
                  IntSpan dilation, bool ceil_mode) {
  check((self.dim() == 2 && self.numel() > 0) ||
            (self.dim() == 3 && self.sizes()[1] > 0 && self.sizes()[2] > 0),
        "max_pool1d: Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for "
        "input, but got ",
        self.sizes());
  const Tensor out = ops::max_pool2d(
      ops::unsqueeze(self, -2), row_pair(kernel_size, 1, "kernel_size"),
      stride.empty() ? Dims{} : row_pair(stride, 1, "stride"), row_pair(padding, 0, "padding"),
      row_pair(dilation, 1, "dilation"), ceil_mode);
  return ops::squeeze_dim(out, Dims{-2});
}
Tensor avg_pool1d(const Tensor& self, IntSpan kernel_size, IntSpan stride, IntSpan padding,
                  bool ceil_mode, bool count_include_pad) {
  const Tensor out =
      ops::avg_pool2d(ops::unsqueeze(self, -2), row_pair(kernel_size, 1, "kernel_size"),
                      stride.empty() ? Dims{} : row_pair(stride, 1, "stride"),
                      row_pair(padding, 0, "padding"), ceil_mode, count_include_pad, std::nullopt);
  return ops::squeeze_dim(out, Dims{-2});
}
Tensor adaptive_avg_pool1d(const Tensor& self, IntSpan output_size) {
  check(output_size.size() == 1, "adaptive_avg_pool1d: 'output_size' should contain one int, got ",
        output_size);
  return ops::squeeze_dim(
      ops::adaptive_avg_pool2d(ops::unsqueeze(self, -2), Dims{1, output_size[0]}), Dims{-2});
}

}  // namespace vt::composite
