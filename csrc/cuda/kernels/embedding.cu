// embedding: rows of a table by index, and the gradient of the table.
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/add_rows.cuh"
#include "cuda/kernels/copy_rows.cuh"
#include "cuda/kernels/embedding_small.cuh"
#include "cuda/kernels/sort.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

void forward(const Tensor& out, const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  const Tensor index = dense_index(indices);
  const Tensor table =
      weight.strides()[1] == 1 || weight.sizes()[1] <= 1 ? weight : contiguous(weight);
  const int64_t size = weight.itemsize();
  copy_rows(Launch(out.device()),
            {static_cast<const char*>(table.data()), static_cast<char*>(out.data()), 1,
             index.numel(), weight.sizes()[1] * size, table.strides()[0] * size, 0},
            indices_of(index, FailedCheck::Embedding, weight.sizes()[0]));
}

__global__ void __launch_bounds__(256)
    index_keys(Indices indices, uint32_t n, uint32_t* keys, uint32_t* positions) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= n) return;
  keys[i] = static_cast<uint32_t>(indices(i));
  positions[i] = static_cast<uint32_t>(i);
}

/// Sums the rows that sorted indices name through a CuTe kernel; false where none is chosen.
bool backward_by_cute(const Launch& launch, const Tensor& out, const Tensor& grad,
                      const uint32_t* sorted, const uint32_t* order, int64_t n,
                      int64_t padding_idx) {
  if (!cute::considered<cute::EmbeddingBackward>()) return false;
  cute::EmbeddingBackward a;
  a.positions = n;
  a.words = out.sizes()[0];
  a.d = out.sizes()[1];
  a.dy = {grad.data(), grad.dtype(), a.d};
  // Indices and positions below 2^31 are the same number signed.
  a.keys = {sorted, DType::Int32};
  a.order = {order, DType::Int32};
  a.table = {out.data(), out.dtype(), out.strides()[0]};
  a.padding_idx = padding_idx;
  return cute::launch(a, launch);
}

void backward(const Tensor& out, const Tensor& grad_output, const Tensor& indices,
              int64_t num_weights, int64_t padding_idx, bool scale_grad_by_freq) {
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  const Tensor index = dense_index(indices);
  Tensor grad = contiguous(grad_output);
  if (grad.dtype() != out.dtype()) {
    grad = empty(grad_output.sizes(), out.dtype(), out.device());
    copy(grad, grad_output, true);
  }
  const int64_t n = index.numel();
  const Indices rows = indices_of(index, FailedCheck::Embedding, num_weights);
  if (!scale_grad_by_freq && sum_into_small_table(launch, out, grad, rows, n, padding_idx)) return;
  check_cuda(cudaMemsetAsync(out.data(), 0, static_cast<size_t>(out.numel() * out.itemsize()),
                             launch.stream()),
             "embedding_dense_backward");
  if (n == 0) return;
  check(num_weights <= int64_t{1} << 32 && n < int64_t{1} << 32, "embedding_dense_backward: ", n,
        " indices into ", num_weights, " rows; both must be below 2^32");
  const Scratch scratch(static_cast<size_t>(n) * 16, launch);
  auto* keys = scratch.data<uint32_t>();
  uint32_t *sorted = keys + n, *positions = sorted + n, *order = positions + n;
  launch(index_keys, dim3(ceil_div<int64_t>(n, 256)), dim3(256), 0, rows, static_cast<uint32_t>(n),
         keys, positions);
  sort_pairs<uint32_t>(launch, keys, sorted, positions, order, n, bits_below(num_weights));
  if (!scale_grad_by_freq && backward_by_cute(launch, out, grad, sorted, order, n, padding_idx))
    return;
  add_rows(launch,
           {{sorted, order, false, n},
            static_cast<const char*>(grad.data()),
            static_cast<char*>(out.data()),
            out.dtype(),
            static_cast<int>(out.itemsize()),
            1,
            num_weights,
            out.sizes()[1],
            padding_idx,
            false,
            scale_grad_by_freq},
           Scalar(1));
}

const RegisterCuda registered([](KernelTable& t) {
  t.embedding = forward;
  t.embedding_dense_backward = backward;
});

}  // namespace
}  // namespace vt::cuda
