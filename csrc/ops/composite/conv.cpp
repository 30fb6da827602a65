// Convolutions in terms of im2col, col2im and matrix products.
#include "ops/composite/arithmetic.h"
#include "ops/meta/windows.h"
#include "vt/meta_decls.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

Dims pair(IntSpan values) { return Dims{meta::at(values, 0), meta::at(values, 1)}; }
/// A 1-d setting as the 2-d one of a plane with a single row.
Dims row_pair(IntSpan values, int64_t first) {
  return values.empty() ? Dims{} : Dims{first, values[0]};
}

Tensor with_bias(const Tensor& out, const Tensor& bias) {
  return bias.defined() ? out + ops::view(bias, Dims{bias.numel(), 1, 1}) : out;
}

void check_conv(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t groups,
                int64_t in_channels, int64_t out_channels, std::string_view op) {
  check(weight.dim() == 4 && (input.dim() == 4 || input.dim() == 3), op,
        ": expected input (N, C, …) or (C, …) and weight with as "
        "many dimensions as batched input, got ",
        input.sizes(), " and ", weight.sizes());
  check(groups > 0, "non-positive groups is not supported");
  check(out_channels % groups == 0, "Given groups=", groups,
        ", expected weight to be divisible by ", groups, " at dimension 0, but got weight of size ",
        weight.sizes(), " instead");
  check(input.size(-3) == in_channels, "Given groups=", groups, ", weight of size ", weight.sizes(),
        ", expected input", input.sizes(), " to have ", in_channels, " channels, but got ",
        input.size(-3), " channels instead");
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

/// weight (G, rows, k) applied to columns (N, G·k, L): (N, G·rows, L).
Tensor grouped_product(const Tensor& weight, const Tensor& columns) {
  const int64_t g = weight.sizes()[0], rows = weight.sizes()[1], k = weight.sizes()[2];
  const int64_t n = columns.sizes()[0], l = columns.sizes()[2];
  if (g == 1) {
    const Tensor left = ops::expand(ops::view(weight, Dims{1, rows, k}), Dims{n, rows, k}, false);
    return ops::bmm(left, columns);
  }
  const Tensor product =
      ops::matmul(ops::unsqueeze(weight, 0), ops::view(columns, Dims{n, g, k, l}));
  return ops::reshape(product, Dims{n, g * rows, l});
}

}  // namespace

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, IntSpan stride,
              IntSpan padding, IntSpan dilation, int64_t groups) {
  check(weight.dim() == 4, "conv2d: expected weight (O, C / groups, kh, kw), got ", weight.sizes());
  const auto w = weight.sizes();
  check_conv(input, weight, bias, groups, w[1] * groups, w[0], "conv2d");
  if (input.dim() == 3) {
    return ops::squeeze_dim(
        ops::conv2d(ops::unsqueeze(input, 0), weight, bias, stride, padding, dilation, groups),
        Dims{0});
  }
  const Dims s = pair(stride), p = pair(padding), d = pair(dilation), kernel{w[2], w[3]};
  const int64_t n = input.sizes()[0];
  Dims out{n, w[0], 0, 0};
  for (size_t i = 0; i < 2; ++i) {
    check(s[i] > 0, "non-positive stride is not supported");
    const int64_t padded = input.sizes()[2 + i] + 2 * p[i], reach = d[i] * (kernel[i] - 1) + 1;
    check(padded >= reach, "Calculated padded input size per channel: ", padded,
          ". Kernel size: ", reach, ". Kernel size can't be greater than actual input size");
    out[2 + i] = meta::window_count(input.sizes()[2 + i], kernel[i], s[i], p[i], d[i]);
  }
  const bool pointwise = w[2] == 1 && w[3] == 1 && s[0] == 1 && s[1] == 1 && p[0] == 0 && p[1] == 0;
  const Tensor columns = pointwise ? ops::reshape(input, Dims{n, input.sizes()[1], out[2] * out[3]})
                                   : ops::im2col(input, kernel, d, p, s);
  const Tensor filters = ops::reshape(weight, Dims{groups, w[0] / groups, w[1] * w[2] * w[3]});
  return with_bias(ops::view(grouped_product(filters, columns), out), bias);
}

Tensor conv1d(const Tensor& input, const Tensor& weight, const Tensor& bias, IntSpan stride,
              IntSpan padding, IntSpan dilation, int64_t groups) {
  check(weight.dim() == 3 && (input.dim() == 2 || input.dim() == 3),
        "Expected 2D (unbatched) or 3D (batched) input to conv1d, "
        "but got input of size: ",
        input.sizes(), " and weight of size: ", weight.sizes());
  const Tensor out =
      ops::conv2d(ops::unsqueeze(input, -2), ops::unsqueeze(weight, -2), bias, row_pair(stride, 1),
                  row_pair(padding, 0), row_pair(dilation, 1), groups);
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
  const Dims s = pair(stride), p = pair(padding), d = pair(dilation), extra = pair(output_padding),
             kernel{w[2], w[3]};
  Dims size{0, 0};
  for (size_t i = 0; i < 2; ++i) {
    check(extra[i] < s[i] || extra[i] < d[i],
          "output padding must be smaller than either stride or dilation, but got "
          "output_padding=",
          extra, ", stride=", s, ", dilation=", d);
    size[i] = (input.sizes()[2 + i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + extra[i] + 1;
    check(size[i] > 0, "conv_transpose2d: calculated output size ", size[i], " is too small");
  }
  const int64_t n = input.sizes()[0], c = w[0] / groups, rows = w[1] * w[2] * w[3];
  const Tensor filters = ops::transpose(ops::reshape(weight, Dims{groups, c, rows}), 1, 2);
  const Tensor flat = ops::reshape(input, Dims{n, w[0], input.sizes()[2] * input.sizes()[3]});
  Tensor columns;
  if (groups == 1) {
    columns = ops::bmm(ops::expand(filters, Dims{n, rows, c}, false), flat);
  } else {
    columns = grouped_product(filters, flat);
  }
  if (extra[0] < s[0] && extra[1] < s[1])
    return with_bias(ops::col2im(columns, size, kernel, d, p, s), bias);
  // So much output padding has room for another window, which col2im would miss in the columns:
  // they are added up without padding, which is cut off (or grown) afterwards.
  Dims full{0, 0}, border;
  for (size_t i = 0; i < 2; ++i)
    full[i] = (input.sizes()[2 + i] - 1) * s[i] + d[i] * (kernel[i] - 1) + 1;
  for (const size_t i : {size_t{1}, size_t{0}}) {
    border.push_back(-p[i]);
    border.push_back(extra[i] - p[i]);
  }
  const Tensor whole = ops::col2im(columns, full, kernel, d, Dims{0, 0}, s);
  return with_bias(ops::constant_pad_nd(whole, border, Scalar(0)), bias);
}

Tensor conv_transpose1d(const Tensor& input, const Tensor& weight, const Tensor& bias,
                        IntSpan stride, IntSpan padding, IntSpan output_padding, int64_t groups,
                        IntSpan dilation) {
  const Tensor out = ops::conv_transpose2d(
      ops::unsqueeze(input, -2), ops::unsqueeze(weight, -2), bias, row_pair(stride, 1),
      row_pair(padding, 0), row_pair(output_padding, 0), groups, row_pair(dilation, 1));
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
  const Tensor out =
      ops::max_pool2d(ops::unsqueeze(self, -2), row_pair(kernel_size, 1), row_pair(stride, 1),
                      row_pair(padding, 0), row_pair(dilation, 1), ceil_mode);
  return ops::squeeze_dim(out, Dims{-2});
}
Tensor avg_pool1d(const Tensor& self, IntSpan kernel_size, IntSpan stride, IntSpan padding,
                  bool ceil_mode, bool count_include_pad) {
  const Tensor out =
      ops::avg_pool2d(ops::unsqueeze(self, -2), row_pair(kernel_size, 1), row_pair(stride, 1),
                      row_pair(padding, 0), ceil_mode, count_include_pad, std::nullopt);
  return ops::squeeze_dim(out, Dims{-2});
}
Tensor adaptive_avg_pool1d(const Tensor& self, IntSpan output_size) {
  check(output_size.size() == 1, "adaptive_avg_pool1d: 'output_size' should contain one int, got ",
        output_size);
  return ops::squeeze_dim(
      ops::adaptive_avg_pool2d(ops::unsqueeze(self, -2), row_pair(output_size, 1)), Dims{-2});
}

}  // namespace vt::composite
