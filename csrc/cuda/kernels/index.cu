// index_select, index_add_, index_copy_: whole slices by index. Where an index names a slice
// twice, index_copy_ leaves the last one written and index_add_ adds in a fixed order.
#include <limits>

#include "cuda/kernels/add_rows.cuh"
#include "cuda/kernels/copy_rows.cuh"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/index_checks.cuh"
#include "cuda/kernels/sort.cuh"

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;

dim3 blocks_for(int64_t n) { return dim3(static_cast<unsigned>(ceil_div<int64_t>(n, kThreads))); }

void index_select(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index) {
  const Tensor indices = dense_index(index);
  const int64_t size = self.itemsize();
  Tensor input = self;
  int64_t row_step, outer_step;
  const Extents e = extents_of(self.sizes(), dim);
  if (self.dim() == 2 && self.strides()[1] == 1 && wrap_dim(dim, 2) == 0) {
    row_step = self.strides()[0] * size;  // rows of a slice of columns: no copy
    outer_step = 0;
  } else {
    input = contiguous(self);
    row_step = e.inner * size;
    outer_step = e.length * row_step;
  }
  copy_rows(Launch(out.device()),
            {static_cast<const char*>(input.data()), static_cast<char*>(out.data()), e.outer,
             indices.numel(), e.inner * size, row_step, outer_step},
            indices_of(indices, FailedCheck::IndexSelect, e.length));
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    make_keys(Indices indices, uint32_t n, Key* keys, uint32_t* positions) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  keys[i] = static_cast<Key>(indices(i));
  positions[i] = static_cast<uint32_t>(i);
}

void index_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
               const Scalar& alpha) {
  check_slices(self, dim, index, source, "index_add_()");
  const int64_t n = index.numel();
  if (n == 0 || self.numel() == 0) return;
  check(n < (int64_t{1} << 32) - 1, "index_add_(): ", n,
        " indices; a CUDA device takes fewer than 2^32 - 1 at a time");
  const Tensor values = contiguous(source), indices = dense_index(index);
  on_dense(self, [&](const Tensor& work) {
    const Launch launch(work.device());
    const Extents e = extents_of(work.sizes(), dim);
    const auto run = [&]<class Key>() {
      const Scratch scratch(static_cast<size_t>(n) * (2 * sizeof(Key) + 8), launch);
      Key* keys = scratch.template data<Key>();
      Key* sorted = keys + n;
      auto* positions = reinterpret_cast<uint32_t*>(sorted + n);
      uint32_t* order = positions + n;
      launch(make_keys<Key>, blocks_for(n), dim3(kThreads), 0,
             indices_of(indices, FailedCheck::IndexAdd, e.length), static_cast<uint32_t>(n), keys,
             positions);
      sort_pairs<Key>(launch, keys, sorted, positions, order, n, bits_below(e.length));
      add_rows(launch,
               {{sorted, order, sizeof(Key) == 8, n},
                static_cast<const char*>(values.data()),
                static_cast<char*>(work.data()),
                work.dtype(),
                static_cast<int>(work.itemsize()),
                e.outer,
                e.length,
                e.inner,
                -1,
                true,
                false},
               alpha);
    };
    if (e.length <= int64_t{1} << 32)
      run.template operator()<uint32_t>();
    else
      run.template operator()<uint64_t>();
  });
}

/// last[index] = the last position that names it, plus one.
__global__ void __launch_bounds__(kThreads) find_last(Indices indices, int64_t n, uint32_t* last) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) atomicMax(last + indices(i), static_cast<uint32_t>(i + 1));
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    copy_slices(Indices indices, int64_t n, const uint32_t* last, const Element* source,
                Element* target, Extents e) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= e.outer * n * e.inner) return;
  const int64_t k = at % e.inner, slice = at / e.inner, i = slice % n, o = slice / n;
  const int64_t index = indices(i);
  if (last[index] == static_cast<uint32_t>(i + 1))
    target[(o * e.length + index) * e.inner + k] = source[at];
}

void index_copy(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source) {
  check_slices(self, dim, index, source, "index_copy_()");
  const int64_t n = index.numel();
  if (n == 0 || self.numel() == 0) return;
  check(n < (int64_t{1} << 32) - 1, "index_copy_(): ", n,
        " indices; a CUDA device takes fewer than 2^32 - 1 at a time");
  const Tensor values = contiguous(source), indices = dense_index(index);
  on_dense(self, [&](const Tensor& work) {
    const Launch launch(work.device());
    const Extents e = extents_of(work.sizes(), dim);
    const Indices at = indices_of(indices, FailedCheck::IndexCopy, e.length);
    const auto bytes = static_cast<size_t>(e.length) * sizeof(uint32_t);
    const Scratch scratch(bytes, launch);
    auto* last = scratch.data<uint32_t>();
    check_cuda(cudaMemsetAsync(last, 0, bytes, launch.stream()), "index_copy_");
    launch(find_last, blocks_for(n), dim3(kThreads), 0, at, n, last);
    visit_width(work.itemsize(), [&]<class Element>() {
      launch(copy_slices<Element>, blocks_for(e.outer * n * e.inner), dim3(kThreads), 0, at, n,
             static_cast<const uint32_t*>(last), static_cast<const Element*>(values.data()),
             static_cast<Element*>(work.data()), e);
    });
  });
}

__global__ void __launch_bounds__(kThreads)
    wrap_kernel(const int64_t* in, int64_t n, int64_t size, int64_t* out, FailureSlot* failure) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t index = in[i];
  if (index < -size || index >= size) stop_kernel(failure, FailedCheck::Index, index, size);
  out[i] = index < 0 ? index + size : index;
}

void wrap_index(const Tensor& out, const Tensor& self, int64_t, int64_t size) {
  if (self.numel() == 0) return;
  Tensor input = contiguous(self);
  if (input.dtype() != DType::Int64) {
    input = empty(self.sizes(), DType::Int64, self.device());
    copy(input, self, true);
  }
  Launch(out.device())(wrap_kernel, blocks_for(self.numel()), dim3(kThreads), 0,
                       static_cast<const int64_t*>(input.data()), self.numel(), size,
                       out.data_as<int64_t>(), failure_slot(out.device().index));
}

const RegisterCuda registered([](KernelTable& t) {
  t.index_select = index_select;
  t.index_add_ = index_add;
  t.index_copy_ = index_copy;
  t._wrap_index = wrap_index;
});

}  // namespace
}  // namespace vt::cuda
