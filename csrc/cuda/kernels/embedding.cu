// embedding: rows of a table by index, and the gradient of the table.
#include "cuda/kernels/add_rows.cuh"
#include "cuda/kernels/copy_rows.cuh"
#include "cuda/kernels/sort.cuh"

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

void backward(const Tensor& out, const Tensor& grad_output, const Tensor& indices,
              int64_t num_weights, int64_t padding_idx, bool scale_grad_by_freq) {
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  check_cuda(cudaMemsetAsync(out.data(), 0, static_cast<size_t>(out.numel() * out.itemsize()),
                             launch.stream()),
             "embedding_dense_backward");
  const Tensor index = dense_index(indices);
  Tensor grad = contiguous(grad_output);
  if (grad.dtype() != out.dtype()) {
    grad = empty(grad_output.sizes(), out.dtype(), out.device());
    copy(grad, grad_output, true);
  }
  const int64_t n = index.numel();
  if (n == 0) return;
  check(num_weights <= int64_t{1} << 32 && n < int64_t{1} << 32, "embedding_dense_backward: ", n,
        " indices into ", num_weights, " rows; both must be below 2^32");
  const Scratch scratch(static_cast<size_t>(n) * 16, launch);
  auto* keys = scratch.data<uint32_t>();
  uint32_t *sorted = keys + n, *positions = sorted + n, *order = positions + n;
  launch(index_keys, dim3(ceil_div<int64_t>(n, 256)), dim3(256), 0,
         indices_of(index, FailedCheck::Embedding, num_weights), static_cast<uint32_t>(n), keys,
         positions);
  sort_pairs<uint32_t>(launch, keys, sorted, positions, order, n, bits_below(num_weights));
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
