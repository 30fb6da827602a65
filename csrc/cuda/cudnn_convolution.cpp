#include "cuda/cudnn_convolution.h"

#include "core/kernel_switches.h"
#include "cuda/cudnn.h"

namespace vt::cuda::cudnn {
namespace {

constexpr size_t kMeasured = 8;  // plans to choose from by measurement

Dims strides_of(const Convolution& c, const Dims& sizes) {
  return c.format == MemoryFormat::ChannelsLast ? channels_last_strides(sizes)
                                                : contiguous_strides(sizes);
}

PlanKey key_of(ConvolutionProduct product, const Convolution& c, const PlanLimits& limits) {
  PlanKey key;
  key.add(64 | static_cast<int>(product) | static_cast<int>(c.dtype) << 8 |
          static_cast<int>(c.format) << 16 | int64_t{limits.deterministic} << 24 |
          int64_t{limits.tensor_cores} << 25 | static_cast<int64_t>(limits.wanted) << 26 |
          static_cast<int64_t>(c.input.size()) << 32);
  for (const Dims* sizes : {&c.input, &c.weight, &c.output, &c.stride, &c.padding, &c.dilation})
    key.add(IntSpan(*sizes));
  return key;
}

PlanLimits limits_of(const Convolution& c) {
  return {.deterministic = kernel_switch(KernelSwitch::CudnnDeterministic) ||
                           kernel_switch(KernelSwitch::DeterministicAlgorithms),
          // TF32 is what tensor cores make of float32; narrower formats are never asked for.
          .tensor_cores = c.dtype != DType::Float32 || kernel_switch(KernelSwitch::CudnnTf32),
          .down_conversion = false,
          .wanted = kernel_switch(KernelSwitch::CudnnBenchmark) ? kMeasured : 1};
}

}  // namespace

Plans* convolution_plans(Context& context, ConvolutionProduct product, const Convolution& c) {
  const PlanLimits limits = limits_of(c);
  return context.find(key_of(product, c, limits), [&](Handle handle) {
    const DataType type = data_type(c.dtype);
    Graph g(type == DataType::Double ? DataType::Double : DataType::Float);
    const Graph::Id x = g.operand(type, c.input, strides_of(c, c.input));
    const Graph::Id w = g.operand(type, c.weight, strides_of(c, c.weight));
    const Graph::Id y = g.operand(type, c.output, strides_of(c, c.output));
    const DescriptorType kind =
        product == ConvolutionProduct::Output      ? DescriptorType::ConvolutionForward
        : product == ConvolutionProduct::InputGrad ? DescriptorType::ConvolutionBackwardData
                                                   : DescriptorType::ConvolutionBackwardFilter;
    g.convolution(kind, x, w, y, {c.stride, c.padding, c.dilation});
    return make_plans(g, handle, limits);
  });
}

bool has_convolution(ConvolutionProduct product, const Convolution& c) {
  if (!is_floating(c.dtype) || !kernel_switch(KernelSwitch::CudnnEnabled) || !cudnn_available())
    return false;
  const DeviceGuard guard(c.device.index);
  Plans* plans = convolution_plans(Context::of_device(c.device.index), product, c);
  return plans && !plans->empty();
}

}  // namespace vt::cuda::cudnn
