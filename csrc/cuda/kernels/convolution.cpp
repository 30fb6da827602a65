// Convolutions and their gradients by cuDNN. The front calls these ops only where the backend says
// that it has a plan; elsewhere convolutions are products over windows (windows.cu).
#include <optional>

#include "cuda/cudnn.h"
#include "cuda/cudnn_convolution.h"
#include "cuda/kernels/copy.cuh"

namespace vt::cuda {
namespace {

using cudnn::Context;
using cudnn::Plan;
using cudnn::Plans;

struct Windows {
  IntSpan stride, padding, dilation;
  int64_t groups;
};

/// `t` at an address the plans can read: a view may begin anywhere.
Tensor aligned(const Tensor& t, MemoryFormat format) {
  if (reinterpret_cast<uintptr_t>(t.data()) % 16 == 0 && t.is_contiguous(format)) return t;
  const Tensor out = empty(t.sizes(), t.dtype(), t.device(), format);
  copy(out, t, true);
  return out;
}

void run(const Launch& launch, const Plan& plan, cudnn::Handle handle,
         std::span<void* const> operands) {
  const Scratch workspace(static_cast<size_t>(plan.workspace), launch);
  plan.run(handle, operands, workspace.data());
}

/// Runs every plan twice, times the second, and keeps the fastest.
void keep_fastest(const Launch& launch, Plans& plans, cudnn::Handle handle,
                  std::span<void* const> operands) {
  const Stream stream{launch.stream(), launch.device()};
  std::optional<size_t> best;
  float least = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    Event begin(true), end(true);
    try {
      run(launch, plans[i], handle, operands);
      begin.record(stream);
      run(launch, plans[i], handle, operands);
      end.record(stream);
      end.synchronize();
    } catch (const Error&) {
      continue;  // its workspace does not fit, or it fails at these shapes
    }
    const float time = begin.elapsed(end);
    if (!best || time < least) best = i, least = time;
  }
  Plan chosen = std::move(plans[best.value_or(0)]);
  plans.clear();
  plans.push_back(std::move(chosen));
}

void convolve(ConvolutionProduct product, const Tensor& x, const Tensor& w, const Tensor& y,
              const Windows& windows) {
  const Tensor& result = product == ConvolutionProduct::Output      ? y
                         : product == ConvolutionProduct::InputGrad ? x
                                                                    : w;
  if (result.numel() == 0) return;
  const Tensor& first = product == ConvolutionProduct::Output ? x : y;
  const Tensor& second = product == ConvolutionProduct::WeightGrad ? x : w;
  const MemoryFormat format = convolution_format(first, second);
  const Convolution c{x.sizes(),       w.sizes(),        y.sizes(),      windows.stride,
                      windows.padding, windows.dilation, windows.groups, result.dtype(),
                      format,          result.device()};
  const Launch launch(result.device());
  Context& context = Context::of({launch.stream(), launch.device()});
  Plans* plans = cudnn::convolution_plans(context, product, c);
  check(plans && !plans->empty(), "convolution: cuDNN has no plan for input ", x.sizes(),
        ", weight ", w.sizes(), ", stride ", windows.stride, ", padding ", windows.padding,
        ", dilation ", windows.dilation, " of ", result.dtype(), ": ", cudnn_refusal());
  const auto place = [&](const Tensor& t) { return &t == &result ? t : aligned(t, format); };
  const Tensor a = place(x), b = place(w), d = place(y);
  void* const operands[] = {a.data(), b.data(), d.data()};
  if (plans->size() > 1 && !is_captured({launch.stream(), launch.device()})) [[unlikely]]
    keep_fastest(launch, *plans, context.handle(), operands);
  run(launch, plans->front(), context.handle(), operands);
}

const RegisterCuda registered([](KernelTable& t) {
  t._convolution = [](const Tensor& out, const Tensor& input, const Tensor& weight, IntSpan stride,
                      IntSpan padding, IntSpan dilation, int64_t groups) {
    convolve(ConvolutionProduct::Output, input, weight, out, {stride, padding, dilation, groups});
  };
  t._convolution_input_grad = [](const Tensor& out, const Tensor& grad, const Tensor& weight,
                                 IntSpan, IntSpan stride, IntSpan padding, IntSpan dilation,
                                 int64_t groups) {
    convolve(ConvolutionProduct::InputGrad, out, weight, grad, {stride, padding, dilation, groups});
  };
  t._convolution_weight_grad = [](const Tensor& out, const Tensor& grad, const Tensor& input,
                                  IntSpan, IntSpan stride, IntSpan padding, IntSpan dilation,
                                  int64_t groups) {
    convolve(ConvolutionProduct::WeightGrad, input, out, grad, {stride, padding, dilation, groups});
  };
});

}  // namespace
}  // namespace vt::cuda
