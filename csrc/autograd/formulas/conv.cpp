#include "autograd/formulas/conv.h"

#include "ops/composite/convolution.h"
#include "vt/ops.h"

namespace vt::autograd {

using composite::convolution;
using composite::convolution_input_grad;
using composite::convolution_weight_grad;
using composite::ConvolutionWindow;

std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
                                                const Tensor& weight, IntSpan stride,
                                                IntSpan padding, IntSpan dilation, int64_t groups,
                                                const std::array<bool, 2>& mask) {
  const ConvolutionWindow w{stride, padding, dilation, groups};
  return {mask[0] ? convolution_input_grad(grad, weight, input.sizes(), w) : Tensor(),
          mask[1] ? convolution_weight_grad(grad, input, weight.sizes(), w) : Tensor()};
}
std::tuple<Tensor, Tensor> convolution_input_grad_backward(
    const Tensor& grad, const Tensor& grad_output, const Tensor& weight, IntSpan stride,
    IntSpan padding, IntSpan dilation, int64_t groups, const std::array<bool, 2>& mask) {
  const ConvolutionWindow w{stride, padding, dilation, groups};
  return {mask[0] ? convolution(grad, weight, w) : Tensor(),
          mask[1] ? convolution_weight_grad(grad_output, grad, weight.sizes(), w) : Tensor()};
}
std::tuple<Tensor, Tensor> convolution_weight_grad_backward(
    const Tensor& grad, const Tensor& grad_output, const Tensor& input, IntSpan stride,
    IntSpan padding, IntSpan dilation, int64_t groups, const std::array<bool, 2>& mask) {
  const ConvolutionWindow w{stride, padding, dilation, groups};
  return {mask[0] ? convolution(input, grad, w) : Tensor(),
          mask[1] ? convolution_input_grad(grad_output, grad, input.sizes(), w) : Tensor()};
}

Tensor max_pool2d_gather(const Tensor& grad, const Tensor& indices) {
  const Tensor picked =
      ops::gather(ops::flatten(grad, -2, -1), -1, ops::flatten(indices, -2, -1), false);
  return ops::view(picked, indices.sizes());
}

}  // namespace vt::autograd
