// The coordinates of the true elements of a mask.
#include <thrust/iterator/counting_iterator.h>
#include <cub/device/device_select.cuh>

#include "core/tensor.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {
namespace {

struct Shape {
  int ndim;
  int64_t extent[kMaxDims];
};

/// Row i of `out`: the coordinates of flat position `flat[i]`.
__global__ void __launch_bounds__(256)
    unravel(const int64_t* flat, int64_t n, const __grid_constant__ Shape shape, int64_t* out) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= n) return;
  int64_t rest = flat[i];
  for (int d = shape.ndim - 1; d >= 0; --d) {
    out[i * shape.ndim + d] = rest % shape.extent[d];
    rest /= shape.extent[d];
  }
}

/// `mask` is dense; `out` has a row for each of its true elements.
void nonzero(const Tensor& out, const Tensor& mask) {
  const int64_t n = out.sizes()[0];
  if (n == 0 || mask.dim() == 0) return;
  const Launch launch(out.device());
  const bool flat = mask.dim() == 1;
  const Scratch positions(flat ? 0 : static_cast<size_t>(n) * sizeof(int64_t), launch);
  int64_t* found = flat ? out.data_as<int64_t>() : positions.data<int64_t>();
  const Scratch count(sizeof(int64_t), launch);
  size_t bytes = 0;
  const auto run = [&](void* scratch) {
    check_cuda(cub::DeviceSelect::Flagged(scratch, bytes, thrust::counting_iterator<int64_t>(0),
                                          mask.data_as<bool>(), found, count.data<int64_t>(),
                                          mask.numel(), launch.stream()),
               "nonzero");
  };
  run(nullptr);
  const Scratch scratch(bytes, launch);
  run(scratch.data());
  if (flat) return;
  Shape shape{static_cast<int>(mask.dim()), {}};
  for (int d = 0; d < shape.ndim; ++d) shape.extent[d] = mask.sizes()[d];
  launch(unravel, dim3(ceil_div<int64_t>(n, 256)), dim3(256), 0, found, n, shape,
         out.data_as<int64_t>());
}

const RegisterCuda registered([](KernelTable& t) { t._nonzero_ = nonzero; });

}  // namespace
}  // namespace vt::cuda
