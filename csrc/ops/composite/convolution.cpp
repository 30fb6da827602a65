#include "ops/composite/convolution.h"

#include "core/convolution.h"
#include "core/device_backend.h"
#include "ops/composite/arithmetic.h"
#include "ops/meta/windows.h"

namespace vt::composite {
using namespace arithmetic;

namespace {

Dims output_size(IntSpan input, IntSpan weight, const ConvolutionWindow& w) {
  Dims out{input[0], weight[0]};
  for (size_t i = 0; i + 2 < input.size(); ++i)
    out.push_back(
        meta::window_count(input[i + 2], weight[i + 2], w.stride[i], w.padding[i], w.dilation[i]));
  return out;
}

/// Windows that tile the input are a permutation of it: one matrix product on 16-bit floats is
/// faster than the library's convolutions, where the windows are small and not channels-last.
bool is_tiling(const Tensor& a, const Tensor& b, IntSpan weight, const ConvolutionWindow& w) {
  if (weight.size() != 4 || w.groups != 1 || a.itemsize() != 2 ||
      weight[1] * weight[2] * weight[3] > 1024 ||
      convolution_format(a, b) != MemoryFormat::Contiguous)
    return false;
  for (size_t i = 0; i < 2; ++i) {
    if (w.stride[i] != weight[2 + i] || w.padding[i] != 0 || w.dilation[i] != 1) return false;
  }
  return weight[2] * weight[3] > 1;
}

/// Whether the backend of `a` and `b` has a kernel. Without one, of three spatial dimensions only
/// the value can be composed: all three products are asked for then.
bool has_kernel(ConvolutionProduct product, const Tensor& a, const Tensor& b, IntSpan input,
                IntSpan weight, IntSpan output, const ConvolutionWindow& w) {
  const Device device = a.device();
  if (device.type == DeviceType::CPU || a.numel() == 0 || b.numel() == 0) return false;
  if (is_tiling(a, b, weight, w)) return false;
  DeviceBackend* backend = backend_for(device.type);
  if (!backend) return false;
  const Convolution shape{Dims(input), Dims(weight), Dims(output),
                          w.stride,    w.padding,    w.dilation,
                          w.groups,    a.dtype(),    convolution_format(a, b),
                          device};
  if (input.size() == 4 || product != ConvolutionProduct::Output)
    return backend->has_convolution(product, shape);
  using enum ConvolutionProduct;
  return backend->has_convolution(Output, shape) && backend->has_convolution(InputGrad, shape) &&
         backend->has_convolution(WeightGrad, shape);
}

/// Both in the memory format that one of them has.
std::pair<Tensor, Tensor> in_one_format(const Tensor& a, const Tensor& b) {
  const MemoryFormat format = convolution_format(a, b);
  return {ops::contiguous(a, format), ops::contiguous(b, format)};
}

bool is_pointwise(IntSpan weight, const ConvolutionWindow& w) {
  return weight[2] == 1 && weight[3] == 1 && w.stride[0] == 1 && w.stride[1] == 1 &&
         w.padding[0] == 0 && w.padding[1] == 0;
}

/// The windows of (N, C, H, W) as (N, C·kh·kw, L).
Tensor columns_of(const Tensor& input, IntSpan weight, IntSpan output, const ConvolutionWindow& w) {
  if (is_pointwise(weight, w))
    return ops::reshape(input, Dims{input.sizes()[0], input.sizes()[1], output[2] * output[3]});
  return ops::im2col(input, Dims{weight[2], weight[3]}, w.dilation, w.padding, w.stride);
}

Tensor convolution_by_windows(const Tensor& input, const Tensor& weight, IntSpan output,
                              const ConvolutionWindow& w) {
  const auto k = weight.sizes();
  const Tensor filters = ops::reshape(weight, Dims{w.groups, k[0] / w.groups, k[1] * k[2] * k[3]});
  return ops::view(grouped_product(filters, columns_of(input, k, output, w)), output);
}

/// A convolution over depth as the sum of one over planes for each slice of the weight.
Tensor convolution_by_slices(const Tensor& input, const Tensor& weight, IntSpan output,
                             const ConvolutionWindow& w) {
  if (is_reduced_float(input.dtype())) {  // the sum is rounded once
    const Tensor wide = convolution_by_slices(ops::_to_dtype(input, DType::Float32),
                                              ops::_to_dtype(weight, DType::Float32), output, w);
    return ops::_to_dtype(wide, input.dtype());
  }
  const Tensor padded =
      w.padding[0] == 0
          ? input
          : ops::constant_pad_nd(input, Dims{0, 0, 0, 0, w.padding[0], w.padding[0]}, Scalar(0));
  const ConvolutionWindow planes{Dims{w.stride[1], w.stride[2]}, Dims{w.padding[1], w.padding[2]},
                                 Dims{w.dilation[1], w.dilation[2]}, w.groups};
  const int64_t n = output[0], depth = output[2];
  const auto s = input.sizes();
  Tensor total;
  for (int64_t z = 0; z < weight.sizes()[2]; ++z) {
    const int64_t first = z * w.dilation[0], last = first + (depth - 1) * w.stride[0] + 1;
    const Tensor slices = ops::slice(padded, 2, first, last, w.stride[0]);
    const Tensor flat =
        ops::reshape(ops::transpose(slices, 1, 2), Dims{n * depth, s[1], s[3], s[4]});
    const Tensor part = convolution(flat, ops::select(weight, 2, z), planes);
    total = total.defined() ? total + part : part;
  }
  const Tensor whole = ops::reshape(total, Dims{n, depth, output[1], output[3], output[4]});
  return ops::contiguous(ops::transpose(whole, 1, 2), MemoryFormat::Contiguous);
}

Tensor input_grad_by_windows(const Tensor& grad, const Tensor& weight, IntSpan size,
                             const ConvolutionWindow& w) {
  const auto k = weight.sizes(), g = grad.sizes();
  const int64_t n = g[0], channels = k[0] / w.groups, rows = k[1] * k[2] * k[3];
  const Tensor filters = ops::transpose(ops::reshape(weight, Dims{w.groups, channels, rows}), 1, 2);
  const Tensor flat = ops::reshape(grad, Dims{n, k[0], g[2] * g[3]});
  const Tensor columns = w.groups == 1
                             ? ops::bmm(ops::expand(filters, Dims{n, rows, channels}, false), flat)
                             : grouped_product(filters, flat);
  return ops::col2im(columns, size.last(2), Dims{k[2], k[3]}, w.dilation, w.padding, w.stride);
}

Tensor weight_grad_by_windows(const Tensor& grad, const Tensor& input, IntSpan size,
                              const ConvolutionWindow& w) {
  const auto g = grad.sizes();
  const int64_t n = g[0], l = g[2] * g[3], rows = size[1] * size[2] * size[3];
  const Tensor columns = ops::reshape(columns_of(input, size, g, w), Dims{n, w.groups, rows, l});
  const Tensor flat = ops::reshape(grad, Dims{n, w.groups, size[0] / w.groups, l});
  const Tensor product = ops::matmul(flat, ops::transpose(columns, -2, -1));
  return ops::reshape(sum(product, Dims{0}, false), size);
}

}  // namespace

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

Tensor convolution(const Tensor& input, const Tensor& weight, const ConvolutionWindow& w) {
  const Dims output = output_size(input.sizes(), weight.sizes(), w);
  if (has_kernel(ConvolutionProduct::Output, input, weight, input.sizes(), weight.sizes(), output,
                 w)) {
    const auto [x, k] = in_one_format(input, weight);
    return ops::_convolution(x, k, w.stride, w.padding, w.dilation, w.groups);
  }
  return input.dim() == 5 ? convolution_by_slices(input, weight, output, w)
                          : convolution_by_windows(input, weight, output, w);
}

Tensor convolution_input_grad(const Tensor& grad, const Tensor& weight, IntSpan size,
                              const ConvolutionWindow& w) {
  // Three spatial dimensions come here only where the forward pass found kernels for all.
  if (grad.dim() == 5 || has_kernel(ConvolutionProduct::InputGrad, grad, weight, size,
                                    weight.sizes(), grad.sizes(), w)) {
    const auto [g, k] = in_one_format(grad, weight);
    return ops::_convolution_input_grad(g, k, size, w.stride, w.padding, w.dilation, w.groups);
  }
  return input_grad_by_windows(grad, weight, size, w);
}

Tensor convolution_weight_grad(const Tensor& grad, const Tensor& input, IntSpan size,
                               const ConvolutionWindow& w) {
  if (grad.dim() == 5 || has_kernel(ConvolutionProduct::WeightGrad, grad, input, input.sizes(),
                                    size, grad.sizes(), w)) {
    const auto [g, x] = in_one_format(grad, input);
    return ops::_convolution_weight_grad(g, x, size, w.stride, w.padding, w.dilation, w.groups);
  }
  return weight_grad_by_windows(grad, input, size, w);
}

}  // namespace vt::composite
