// gather and the scatters: one index an element. Where several elements go to one place, scatter
// leaves the last, and sums, products and extremes are taken in index order, so results do not
// depend on timing.
#include <string_view>

#include "cuda/kernels/add_rows.cuh"
#include "cuda/kernels/index_checks.cuh"
#include "cuda/kernels/indices.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/kernels/sort.cuh"

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;

dim3 blocks_for(int64_t n) { return dim3(static_cast<unsigned>(ceil_div<int64_t>(n, kThreads))); }

/// From an element of the index to its place in a dense tensor: the same coordinates, but along
/// one dimension the index's value.
struct Places {
  Indices indices;
  IndexSpace<1> space;  // strides of the tensor, 0 along the dimension
  int64_t stride;       // along the dimension

  __device__ int64_t operator()(int64_t i) const {
    int64_t offset[1];
    space.get(i, offset);
    return offset[0] + indices(i) * stride;
  }
};

Places places(const Tensor& dense_index, IntSpan sizes, int64_t dim, FailedCheck op) {
  const int64_t n = dense_index.dim(), d = n == 0 ? 0 : wrap_dim(dim, n);
  Places p{indices_of(dense_index, op, sizes.empty() ? 1 : sizes[d]), {}, 1};
  const Dims strides = contiguous_strides(sizes);
  if (n > 0 && !sizes.empty()) p.stride = strides[d];
  bool fits = true;
  for (int64_t k = n - 1; k >= 0; --k) {
    const int64_t step = k == d || sizes.empty() ? 0 : strides[k];
    fits = fits && p.space.push(dense_index.sizes()[k], {step});
  }
  check(fits, "an index of shape ", dense_index.sizes(), " into a tensor of shape ", sizes,
        " has more dimensions than a CUDA kernel handles (", kReduceDims, "); merge some");
  p.space.finish();
  return p;
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Places places, int64_t n, const Element* from,
                  Element* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) to[i] = from[places(i)];
}

void gather(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index, bool) {
  const int64_t n = index.numel();
  if (n == 0) return;
  const Tensor input = contiguous(self), indices = dense_index(index);
  const Places p = places(indices, input.sizes(), dim, FailedCheck::Gather);
  const Launch launch(out.device());
  visit_width(out.itemsize(), [&]<class Element>() {
    launch(gather_kernel<Element>, blocks_for(n), dim3(kThreads), 0, p, n,
           static_cast<const Element*>(input.data()), static_cast<Element*>(out.data()));
  });
}

/// The part of `src` that `index` covers, dense.
Tensor covered(const Tensor& src, const Tensor& index) {
  if (src.dim() == 0) return src;
  return contiguous(make_view(src, index.sizes(), src.strides(), src.storage_offset()));
}

/// last[place] = the last element that goes there, plus one.
__global__ void __launch_bounds__(kThreads)
    find_last(const __grid_constant__ Places places, int64_t n, uint32_t* last) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) atomicMax(last + places(i), static_cast<uint32_t>(i + 1));
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ Places places, int64_t n, const uint32_t* last,
                   const Element* from, Element* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t place = places(i);
  if (last[place] == static_cast<uint32_t>(i + 1)) to[place] = from[i];
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    make_keys(const __grid_constant__ Places places, uint32_t n, Key* keys, uint32_t* positions) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  keys[i] = static_cast<Key>(places(i));
  positions[i] = static_cast<uint32_t>(i);
}

/// Elements are counted in 32 bits.
void check_count(int64_t n, std::string_view op) {
  check(n < (int64_t{1} << 32) - 1, op, ": an index of ", n,
        " elements; a CUDA device takes fewer than 2^32 - 1 at a time");
}

/// Calls `body` with the elements of the index sorted by their place among `numel`.
template <class F>
void by_place(const Launch& launch, const Places& p, int64_t n, int64_t numel, F&& body) {
  const auto run = [&]<class Key>() {
    const Scratch scratch(static_cast<size_t>(n) * (2 * sizeof(Key) + 8), launch);
    Key* keys = scratch.template data<Key>();
    Key* sorted = keys + n;
    auto* positions = reinterpret_cast<uint32_t*>(sorted + n);
    uint32_t* order = positions + n;
    launch(make_keys<Key>, blocks_for(n), dim3(kThreads), 0, p, static_cast<uint32_t>(n), keys,
           positions);
    sort_pairs<Key>(launch, keys, sorted, positions, order, n, bits_below(numel));
    body(SortedIndex{sorted, order, sizeof(Key) == 8, n});
  };
  if (numel <= int64_t{1} << 32)
    run.template operator()<uint32_t>();
  else
    run.template operator()<uint64_t>();
}

/// The last of each run of equal places is written.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    scatter_sorted(SortedIndex index, const Element* from, Element* to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= index.n) return;
  const int64_t place = index.key(i);
  if (i + 1 == index.n || index.key(i + 1) != place) to[place] = from[index.positions[i]];
}

void scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  check_elements(self, dim, index, src, "scatter");
  const int64_t n = index.numel();
  if (n == 0) return;
  check_count(n, "scatter_");
  const Tensor values = covered(src, index), indices = dense_index(index);
  on_dense(self, [&](const Tensor& work) {
    const Launch launch(work.device());
    const Places p = places(indices, work.sizes(), dim, FailedCheck::Scatter);
    if (n < work.numel() / 4) {  // a mark for every place would outweigh a sort
      by_place(launch, p, n, work.numel(), [&](const SortedIndex& sorted) {
        visit_width(work.itemsize(), [&]<class Element>() {
          launch(scatter_sorted<Element>, blocks_for(n), dim3(kThreads), 0, sorted,
                 static_cast<const Element*>(values.data()), static_cast<Element*>(work.data()));
        });
      });
      return;
    }
    const auto bytes = static_cast<size_t>(work.numel()) * sizeof(uint32_t);
    const Scratch scratch(bytes, launch);
    auto* last = scratch.data<uint32_t>();
    check_cuda(cudaMemsetAsync(last, 0, bytes, launch.stream()), "scatter_");
    launch(find_last, blocks_for(n), dim3(kThreads), 0, p, n, last);
    visit_width(work.itemsize(), [&]<class Element>() {
      launch(scatter_kernel<Element>, blocks_for(n), dim3(kThreads), 0, p, n,
             static_cast<const uint32_t*>(last), static_cast<const Element*>(values.data()),
             static_cast<Element*>(work.data()));
    });
  });
}

void scatter_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  check_elements(self, dim, index, src, "scatter_add");
  const int64_t n = index.numel();
  if (n == 0) return;
  check_count(n, "scatter_add_");
  const Tensor values = covered(src, index), indices = dense_index(index);
  on_dense(self, [&](const Tensor& work) {
    const Launch launch(work.device());
    const Places p = places(indices, work.sizes(), dim, FailedCheck::ScatterAdd);
    by_place(launch, p, n, work.numel(), [&](const SortedIndex& sorted) {
      add_rows(
          launch,
          {sorted, static_cast<const char*>(values.data()), static_cast<char*>(work.data()),
           work.dtype(), static_cast<int>(work.itemsize()), 1, work.numel(), 1, -1, true, false},
          Scalar(1));
    });
  });
}

enum class Reduction : int { Product, Max, Min };

/// The first element of each run of equal places folds the run in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_runs(SortedIndex index, Reduction reduction, bool include_self, const char* source,
              char* target, DType dtype, int size) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= index.n) return;
  const int64_t key = index.key(i);
  if (i > 0 && index.key(i - 1) == key) return;
  char* to = target + key * size;
  T result = include_self ? load_as<T>(to, dtype) : T(0);
  bool first = !include_self;
  for (int64_t j = i; j < index.n && index.key(j) == key; ++j) {
    const T x = load_as<T>(source + int64_t{index.positions[j]} * size, dtype);
    if (first)
      result = x;
    else if (reduction == Reduction::Product)
      result = result * x;
    else if (x != x ||
             (result == result && (reduction == Reduction::Max ? x >= result : x <= result)))
      result = x;  // nan wins and stays
    first = false;
  }
  store_as<T>(to, dtype, result);
}

void scatter_reduce(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index,
                    const Tensor& src, std::string_view reduce, bool include_self) {
  copy(out, self, true);
  const int64_t n = index.numel();
  if (n == 0) return;
  check_elements(out, dim, index, src, "scatter_reduce");
  check_count(n, "scatter_reduce");
  const Tensor values = covered(src, index), indices = dense_index(index);
  const Launch launch(out.device());
  const Places p = places(indices, out.sizes(), dim, FailedCheck::ScatterReduce);
  const Reduction reduction = reduce == "prod"   ? Reduction::Product
                              : reduce == "amax" ? Reduction::Max
                                                 : Reduction::Min;
  by_place(launch, p, n, out.numel(), [&](const SortedIndex& sorted) {
    visit_compute(out.dtype(), [&]<class T>() {
      launch(fold_runs<T>, blocks_for(n), dim3(kThreads), 0, sorted, reduction, include_self,
             static_cast<const char*>(values.data()), static_cast<char*>(out.data()), out.dtype(),
             static_cast<int>(out.itemsize()));
    });
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.gather = gather;
  t._scatter_ = scatter;
  t.scatter_add_ = scatter_add;
  t._scatter_reduce = scatter_reduce;
});

}  // namespace
}  // namespace vt::cuda
