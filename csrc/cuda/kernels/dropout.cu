// native_dropout and its gradient: one pass that draws, masks and scales.
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/philox.cuh"

namespace vt::cuda {
namespace {

/// Elements a thread takes: whole counters, and 16-byte accesses.
template <class S>
inline constexpr int kDropoutWidth = sizeof(S) == 2 ? 8 : 4;

/// An element is kept where its number is at least `limit` (p times 2^32).
template <class S>
__global__ void __launch_bounds__(kBlock)
    dropout_kernel(S* out, bool* mask, const S* in, uint64_t limit, Compute<S> scale,
                   PhiloxState rng, int64_t n, bool vectors) {
  constexpr int kWidth = kDropoutWidth<S>;
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i * kWidth < n; i += step) {
    uint32_t bits[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth / 4; ++c) {
      const Philox4 drawn = stream(static_cast<uint64_t>(i * (kWidth / 4) + c));
#pragma unroll
      for (int k = 0; k < 4; ++k) bits[4 * c + k] = drawn.value[k];
    }
    if (vectors && (i + 1) * kWidth <= n) {
      Vector<S, kWidth> x = reinterpret_cast<const Vector<S, kWidth>*>(in)[i];
      Vector<bool, kWidth> keep;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        keep.value[k] = bits[k] >= limit;
        x.value[k] =
            convert<S>(keep.value[k] ? convert<Compute<S>>(x.value[k]) * scale : Compute<S>(0));
      }
      reinterpret_cast<Vector<S, kWidth>*>(out)[i] = x;
      reinterpret_cast<Vector<bool, kWidth>*>(mask)[i] = keep;
      continue;
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int64_t at = i * kWidth + k;
      if (at >= n) break;
      const bool keep = bits[k] >= limit;
      out[at] = convert<S>(keep ? convert<Compute<S>>(in[at]) * scale : Compute<S>(0));
      mask[at] = keep;
    }
  }
}

/// The same numbers through a CuTe kernel; false where none is chosen. `source` lies as `output`.
bool dropout_by_cute(const Launch& launch, const Tensor& output, const Tensor& mask,
                     const Tensor& source, uint64_t limit, double scale, const PhiloxState& rng) {
  if (!cute::considered<cute::DropoutForward>()) return false;
  cute::DropoutForward a;
  a.n = output.numel();
  a.words = 2;
  a.x = {source.data(), source.dtype()};
  a.y = {output.data(), output.dtype()};
  a.mask = {mask.data(), DType::UInt8};
  if (rng.state) a.state = {rng.state, DType::Int64};
  a.limit = limit;
  a.scale = static_cast<float>(scale);
  a.seed = rng.seed;
  a.offset = rng.offset;
  return cute::launch(a, launch);
}

/// Elements are numbered as they lie in `output`, which is dense.
void native_dropout(const Tensor& output, const Tensor& mask, const Tensor& input, double p,
                    std::optional<bool> train, const PhiloxArgs& rng) {
  const int64_t n = output.numel();
  if (n == 0) return;
  const Launch launch(output.device());
  if (!train.value_or(true)) {
    copy(output, input, true);
    check_cuda(cudaMemsetAsync(mask.data(), 1, static_cast<size_t>(n), launch.stream()),
               "filling a dropout mask");
    return;
  }
  Tensor source = input;
  if (!equal(input.strides(), output.strides())) {
    source = output;
    copy(output, input, true);
  }
  const auto limit = static_cast<uint64_t>(p * 0x1p32);
  if (dropout_by_cute(launch, output, mask, source, limit, p < 1 ? 1 / (1 - p) : 0,
                      PhiloxState(rng)))
    return;
  visit_float_storage(input.dtype(), [&]<class S>() {
    constexpr int kWidth = kDropoutWidth<S>;
    const Compute<S> scale = p < 1 ? static_cast<Compute<S>>(1 / (1 - p)) : Compute<S>(0);
    const auto aligned = [](const void* data, size_t bytes) {
      return reinterpret_cast<uintptr_t>(data) % bytes == 0;
    };
    const bool vectors = aligned(source.data(), sizeof(S) * kWidth) &&
                         aligned(output.data(), sizeof(S) * kWidth) && aligned(mask.data(), kWidth);
    launch(dropout_kernel<S>, dim3(launch.fill(ceil_div<int64_t>(n, kWidth * kBlock), kBlock, 8)),
           dim3(kBlock), 0, output.data_as<S>(), mask.data_as<bool>(), source.data_as<S>(), limit,
           scale, PhiloxState(rng), n, vectors);
  });
}

template <class T>
struct KeepScaled {
  T scale;
  __device__ T operator()(T keep, T gradient) const {
    return keep != T(0) ? gradient * scale : T(0);
  }
};

void dropout_backward(const Tensor& out, const Tensor& grad, const Tensor& mask, double scale) {
  Tensor target = out;
  TensorIterator it;
  it.binary(target, mask, grad,
            {.promote = Promote::None,
             .output_dtype = out.dtype(),
             .op = "_dropout_backward",
             .check_overlap = false});
  visit_compute_float(grad.dtype(), [&]<class T>() {
    map_masked_kernel<T, 2>(it, KeepScaled<T>{static_cast<T>(scale)});
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.native_dropout = native_dropout;
  t._dropout_backward = dropout_backward;
});

}  // namespace
}  // namespace vt::cuda
