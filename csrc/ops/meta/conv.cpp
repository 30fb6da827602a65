// Checks and output shapes of convolutions, unfolding and pooling.
#include "core/convolution.h"
#include "ops/meta/windows.h"
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

void check_windows(const Tensor& self, IntSpan kernel, IntSpan stride, IntSpan padding,
                   IntSpan dilation, std::string_view op) {
  check(self.dim() == 3 || self.dim() == 4, op,
        ": Expected 3D or 4D (batch mode) tensor for input, but got ", self.sizes());
  const std::pair<const char*, IntSpan> settings[] = {
      {"kernel_size", kernel}, {"stride", stride}, {"padding", padding}, {"dilation", dilation}};
  for (const auto& [name, values] : settings) {
    check(values.size() == 1 || values.size() == 2, op, ": ", name,
          " must either be a single int, or a tuple of two ints, but got ", values);
  }
  for (size_t i = 0; i < 2; ++i) {
    check(at(kernel, i) > 0, op, ": kernel size should be greater than zero, but got ", kernel);
    check(at(stride, i) > 0, op, ": stride should be greater than zero, but got ", stride);
    check(at(dilation, i) > 0, op, ": dilation should be greater than zero, but got ", dilation);
    check(at(padding, i) >= 0, op, ": padding must be non-negative, but got ", padding);
  }
}

Tensor pooled(const Tensor& self, IntSpan kernel, IntSpan stride_or_none, IntSpan padding,
              IntSpan dilation, bool ceil_mode, std::string_view op) {
  const IntSpan stride = stride_or_none.empty() ? kernel : stride_or_none;
  check_windows(self, kernel, stride, padding, dilation, op);
  if (self.dtype() == DType::Bool)
    fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for 'Bool'");
  Dims sizes(self.sizes());
  for (size_t i = 0; i < 2; ++i) {
    check(at(padding, i) * 2 <= at(kernel, i), op,
          ": pad should be at most half of effective kernel size, but got pad=", at(padding, i),
          ", kernel_size=", at(kernel, i));
    const size_t d = sizes.size() - 2 + i;
    const int64_t n = window_count(sizes[d], at(kernel, i), at(stride, i), at(padding, i),
                                   at(dilation, i), ceil_mode);
    check(n >= 1, "Given input size: ", self.sizes(), ". Calculated output size of ", op,
          " is too small");
    sizes[d] = n;
  }
  return empty(sizes, self.dtype(), self.device());
}

void check_dense(const Tensor& a, const Tensor& b, std::string_view op) {
  const MemoryFormat format = convolution_format(a, b);
  check((a.dim() == 4 || a.dim() == 5) && a.dim() == b.dim() && a.dtype() == b.dtype() &&
            a.is_contiguous(format) && b.is_contiguous(format),
        op, ": expected two dense operands of one memory format, 4-D or 5-D and of one dtype, got ",
        a.sizes(), " and ", b.sizes());
}

}  // namespace

Tensor _convolution(const Tensor& input, const Tensor& weight, IntSpan stride, IntSpan padding,
                    IntSpan dilation, int64_t) {
  check_dense(input, weight, "_convolution");
  Dims sizes{input.sizes()[0], weight.sizes()[0]};
  for (size_t i = 0; i + 2 < input.sizes().size(); ++i)
    sizes.push_back(window_count(input.sizes()[i + 2], weight.sizes()[i + 2], stride[i], padding[i],
                                 dilation[i]));
  return empty(sizes, input.dtype(), input.device(), convolution_format(input, weight));
}
Tensor _convolution_input_grad(const Tensor& grad_output, const Tensor& weight, IntSpan input_size,
                               IntSpan, IntSpan, IntSpan, int64_t) {
  check_dense(grad_output, weight, "_convolution_input_grad");
  return empty(input_size, grad_output.dtype(), grad_output.device(),
               convolution_format(grad_output, weight));
}
Tensor _convolution_weight_grad(const Tensor& grad_output, const Tensor& input, IntSpan weight_size,
                                IntSpan, IntSpan, IntSpan, int64_t) {
  check_dense(grad_output, input, "_convolution_weight_grad");
  return empty(weight_size, grad_output.dtype(), grad_output.device(),
               convolution_format(grad_output, input));
}

Tensor im2col(const Tensor& self, IntSpan kernel_size, IntSpan dilation, IntSpan padding,
              IntSpan stride) {
  check_windows(self, kernel_size, stride, padding, dilation, "im2col");
  const size_t n = self.sizes().size();
  int64_t windows = 1;
  for (size_t i = 0; i < 2; ++i) {
    const int64_t count = window_count(self.sizes()[n - 2 + i], at(kernel_size, i), at(stride, i),
                                       at(padding, i), at(dilation, i));
    check(count >= 1, "Given input with spatial size ", self.sizes().last(2),
          ", kernel_size=", kernel_size, ", dilation=", dilation, ", padding=", padding,
          ", calculated shape of the array of sliding blocks is too small (non-positive).");
    windows *= count;
  }
  Dims sizes(self.sizes().first(n - 3));
  sizes.push_back(self.sizes()[n - 3] * at(kernel_size, 0) * at(kernel_size, 1));
  sizes.push_back(windows);
  return empty(sizes, self.dtype(), self.device());
}

Tensor col2im(const Tensor& self, IntSpan output_size, IntSpan kernel_size, IntSpan dilation,
              IntSpan padding, IntSpan stride) {
  check(self.dim() == 2 || self.dim() == 3,
        "col2im: Expected 2D or 3D (batch mode) tensor for input, but got ", self.sizes());
  if (self.dtype() == DType::Bool)
    fail(ErrorKind::NotImplemented, "\"col2im_out_cpu\" not implemented for 'Bool'");
  const int64_t area = at(kernel_size, 0) * at(kernel_size, 1), rows = self.size(-2);
  check(area > 0 && rows % area == 0,
        "Expected size of input's dimension 1 to be divisible by the product of kernel_size, but "
        "got input.size(1)=",
        rows, " and kernel_size=", kernel_size, ".");
  int64_t windows = 1;
  for (size_t i = 0; i < 2; ++i) {
    windows *= window_count(at(output_size, i), at(kernel_size, i), at(stride, i), at(padding, i),
                            at(dilation, i));
  }
  check(windows == self.size(-1), "Given output_size=", output_size, ", kernel_size=", kernel_size,
        ", dilation=", dilation, ", padding=", padding, ", stride=", stride,
        ", expected size of input's dimension 2 to match the calculated number of "
        "sliding blocks ",
        windows, ", but got input.size(2)=", self.size(-1), ".");
  Dims sizes(self.sizes().first(self.sizes().size() - 2));
  sizes.push_back(rows / area);
  sizes.push_back(at(output_size, 0));
  sizes.push_back(at(output_size, 1));
  return empty(sizes, self.dtype(), self.device());
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& self, IntSpan kernel_size,
                                                   IntSpan stride, IntSpan padding,
                                                   IntSpan dilation, bool ceil_mode) {
  Tensor values = pooled(self, kernel_size, stride, padding, dilation, ceil_mode, "max_pool2d");
  Tensor indices = empty(values.sizes(), DType::Int64, self.device());
  return {values, indices};
}
Tensor max_pool2d_backward(const Tensor& grad, const Tensor& indices, IntSpan input_sizes) {
  check(indices.dtype() == DType::Int64 && equal(grad.sizes(), indices.sizes()) &&
            input_sizes.size() == grad.sizes().size(),
        "max_pool2d_backward: gradients of ", grad.sizes(),
        " need as many int64 indices and sizes of "
        "an input, got ",
        indices.dtype(), " ", indices.sizes(), " and ", input_sizes);
  return empty(input_sizes, grad.dtype(), grad.device());
}
Tensor avg_pool2d(const Tensor& self, IntSpan kernel_size, IntSpan stride, IntSpan padding,
                  bool ceil_mode, bool, std::optional<int64_t> divisor_override) {
  check(!divisor_override || *divisor_override != 0, "divisor must be not zero");
  return pooled(self, kernel_size, stride, padding, Dims{1, 1}, ceil_mode, "avg_pool2d");
}
Tensor avg_pool2d_backward(const Tensor& grad, IntSpan input_sizes, IntSpan, IntSpan, IntSpan, bool,
                           bool, std::optional<int64_t>) {
  return empty(input_sizes, grad.dtype(), grad.device());
}
Tensor adaptive_avg_pool2d(const Tensor& self, IntSpan output_size) {
  check(output_size.size() == 1 || output_size.size() == 2,
        "adaptive_avg_pool2d: output_size must be 2, got ", output_size);
  check(self.dim() == 3 || self.dim() == 4,
        "adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got ", self.sizes());
  if (!is_floating(self.dtype())) {
    fail(ErrorKind::NotImplemented, "\"adaptive_avg_pool2d\" not implemented for '", self.dtype(),
         "'");
  }
  Dims sizes(self.sizes());
  for (size_t i = 0; i < 2; ++i) {
    check(at(output_size, i) >= 0,
          "adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0");
    check(sizes[sizes.size() - 2 + i] > 0,
          "adaptive_avg_pool2d(): Expected input to have non-zero size for non-batch "
          "dimensions, but input has sizes ",
          self.sizes());
    sizes[sizes.size() - 2 + i] = at(output_size, i);
  }
  return empty(sizes, self.dtype(), self.device());
}
Tensor adaptive_avg_pool2d_backward(const Tensor& grad, IntSpan input_sizes) {
  return empty(input_sizes, grad.dtype(), grad.device());
}

}  // namespace vt::meta
