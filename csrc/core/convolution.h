// The geometry of a convolution, as the front asks a backend whether it has a kernel for it.
#pragma once

#include "core/device.h"
#include "core/dtype.h"
#include "core/small_vector.h"
#include "core/tensor.h"

namespace vt {

/// A convolution's value, and its gradients: each is linear in two of input, weight and output, and
/// gives the third.
enum class ConvolutionProduct : uint8_t { Output, InputGrad, WeightGrad };

/// input (N, C, …), weight (O, C / groups, …), output (N, O, …), all dense in one memory format.
struct Convolution {
  Dims input, weight, output;
  Dims stride, padding, dilation;
  int64_t groups = 1;
  DType dtype = DType::Float32;
  MemoryFormat format = MemoryFormat::Contiguous;
  Device device;
};

/// ChannelsLast if one of the operands is laid out so and not otherwise.
inline MemoryFormat convolution_format(const Tensor& a, const Tensor& b) {
  for (const Tensor* t : {&a, &b}) {
    if (t->dim() == 4 && !t->is_contiguous() && t->is_contiguous(MemoryFormat::ChannelsLast))
      return MemoryFormat::ChannelsLast;
  }
  return MemoryFormat::Contiguous;
}

}  // namespace vt
