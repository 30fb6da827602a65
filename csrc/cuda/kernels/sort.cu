// sort along a dimension. Elements become unsigned keys that order as torch orders values (nan
// last, -0 equal to 0); the row goes into the key's upper bits, so one stable radix sort orders all
// rows at once.
#include "cuda/kernels/sort.cuh"

#include <cub/device/device_radix_sort.cuh>

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/element.cuh"

namespace vt::cuda {

template <class Key>
void sort_pairs(const Launch& launch, const Key* keys, Key* sorted_keys, const uint32_t* values,
                uint32_t* sorted_values, int64_t n, int bits) {
  size_t bytes = 0;
  const auto run = [&](void* scratch) {
    check_cuda(
        cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted_keys, values, sorted_values,
                                        static_cast<uint32_t>(n), 0, bits, launch.stream()),
        "sorting");
  };
  run(nullptr);
  const Scratch scratch(bytes, launch);
  run(scratch.data());
}
template void sort_pairs<uint32_t>(const Launch&, const uint32_t*, uint32_t*, const uint32_t*,
                                   uint32_t*, int64_t, int);
template void sort_pairs<uint64_t>(const Launch&, const uint64_t*, uint64_t*, const uint32_t*,
                                   uint32_t*, int64_t, int);

namespace {

constexpr int kThreads = 256;

/// The bits of a float as an unsigned number in the order of values.
template <class Bits>
__device__ uint64_t ordered_float(Bits bits, Bits infinity) {
  constexpr Bits kSign = static_cast<Bits>(Bits(1) << (sizeof(Bits) * 8 - 1));
  const auto magnitude = static_cast<Bits>(bits & static_cast<Bits>(~kSign));
  if (magnitude > infinity) return static_cast<Bits>(~Bits(0));  // nan
  if (magnitude == 0) return kSign;                              // 0 and -0
  return static_cast<Bits>(bits & kSign ? ~bits : bits | kSign);
}

/// The element at `p` as a key of item_size(dtype) bytes.
__device__ uint64_t ordered_key(const char* p, DType dtype) {
  switch (dtype) {
    case DType::Bool:
    case DType::UInt8:
      return *reinterpret_cast<const uint8_t*>(p);
    case DType::Int8:
      return *reinterpret_cast<const uint8_t*>(p) ^ 0x80u;
    case DType::Int16:
      return *reinterpret_cast<const uint16_t*>(p) ^ 0x8000u;
    case DType::Int32:
      return *reinterpret_cast<const uint32_t*>(p) ^ 0x80000000u;
    case DType::Int64:
      return *reinterpret_cast<const uint64_t*>(p) ^ (uint64_t{1} << 63);
    case DType::Float16:
      return ordered_float<uint16_t>(*reinterpret_cast<const uint16_t*>(p), 0x7c00);
    case DType::BFloat16:
      return ordered_float<uint16_t>(*reinterpret_cast<const uint16_t*>(p), 0x7f80);
    case DType::Float32:
      return ordered_float<uint32_t>(*reinterpret_cast<const uint32_t*>(p), 0x7f800000u);
    case DType::Float64:
      return ordered_float<uint64_t>(*reinterpret_cast<const uint64_t*>(p), 0x7ff0000000000000u);
  }
  return 0;
}

/// Rows of a dense [outer, length, inner] tensor from row `first` on; row r is (r / inner,
/// r % inner). Their elements are counted row by row.
struct Rows {
  int64_t length, inner, first;
  __device__ int64_t position(uint32_t element) const {
    const int64_t row = first + element / static_cast<uint32_t>(length),
                  i = element % static_cast<uint32_t>(length);
    return row / inner * length * inner + i * inner + row % inner;
  }
};

template <class Key>
__global__ void __launch_bounds__(kThreads)
    make_keys(const char* data, DType dtype, int size, Rows rows, uint32_t n, int key_bits,
              bool with_row, bool descending, Key* keys, uint32_t* elements) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const auto element = static_cast<uint32_t>(i);
  uint64_t key = ordered_key(data + rows.position(element) * size, dtype);
  if (descending) key = ~key & (~uint64_t{0} >> (64 - key_bits));
  if (with_row)
    key |= static_cast<uint64_t>(element / static_cast<uint32_t>(rows.length)) << key_bits;
  keys[i] = static_cast<Key>(key);
  elements[i] = element;
}

__global__ void __launch_bounds__(kThreads)
    row_keys(const uint32_t* elements, uint32_t n, uint32_t length, uint32_t* keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) keys[i] = elements[i] / length;
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    write_sorted(const Element* data, const uint32_t* elements, Rows rows, uint32_t n,
                 Element* values, int64_t* indices) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const uint32_t element = elements[i];
  const int64_t to = rows.position(static_cast<uint32_t>(i));
  values[to] = data[rows.position(element)];
  indices[to] = element % static_cast<uint32_t>(rows.length);
}

/// The elements [0, n) of `rows` in sorted order.
void sort_rows(const Launch& launch, const Tensor& input, const Rows& rows, uint32_t n,
               bool descending, uint32_t* sorted) {
  const dim3 grid(ceil_div<uint32_t>(n, kThreads)), block(kThreads);
  const auto* data = static_cast<const char*>(input.data());
  const DType dtype = input.dtype();
  const int64_t count = n / rows.length;
  const int size = static_cast<int>(item_size(dtype)), key_bits = size * 8,
            row_bits = count == 1 ? 0 : bits_below(count);
  const Scratch elements(size_t{n} * 4, launch);
  const auto keyed = [&]<class Key>(bool with_row) {
    const Scratch keys(size_t{n} * sizeof(Key) * 2, launch);
    Key* from = keys.template data<Key>();
    launch(make_keys<Key>, grid, block, 0, data, dtype, size, rows, n, key_bits, with_row,
           descending, from, elements.data<uint32_t>());
    sort_pairs<Key>(launch, from, from + n, elements.data<uint32_t>(), sorted, n,
                    with_row ? key_bits + row_bits : key_bits);
  };
  if (key_bits + row_bits <= 32) return keyed.template operator()<uint32_t>(row_bits > 0);
  if (key_bits + row_bits <= 64) return keyed.template operator()<uint64_t>(row_bits > 0);
  // No room for the row: by value first, then, stably, by row.
  keyed.template operator()<uint64_t>(false);
  const Scratch keys(size_t{n} * 8, launch);
  auto* from = keys.data<uint32_t>();
  launch(row_keys, grid, block, 0, sorted, n, static_cast<uint32_t>(rows.length), from);
  sort_pairs<uint32_t>(launch, from, from + n, sorted, elements.data<uint32_t>(), n, row_bits);
  check_cuda(cudaMemcpyAsync(sorted, elements.data(), size_t{n} * 4, cudaMemcpyDeviceToDevice,
                             launch.stream()),
             "sorting");
}

void sort(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim,
          bool descending, bool) {
  if (self.numel() == 0) return;
  const Tensor input = contiguous(self);
  int64_t outer = 1, length = 1, inner = 1;
  if (self.dim() > 0) {
    const int64_t d = wrap_dim(dim, self.dim());
    for (int64_t i = 0; i < self.dim(); ++i)
      (i < d ? outer : i == d ? length : inner) *= self.sizes()[i];
  }
  check(length < int64_t{1} << 31, "sort: a dimension of ", length,
        " elements is more than a CUDA device sorts (2^31 - 1); split the tensor ", self.sizes());
  const Launch launch(self.device());
  // Some rows at a time where 32 bits do not count them all.
  const int64_t all = outer * inner, most = std::max<int64_t>((int64_t{1} << 31) / length, 1);
  const Scratch sorted(static_cast<size_t>(std::min(all, most) * length) * 4, launch);
  for (int64_t first = 0; first < all; first += most) {
    const Rows rows{length, inner, first};
    const auto n = static_cast<uint32_t>(std::min(most, all - first) * length);
    sort_rows(launch, input, rows, n, descending, sorted.data<uint32_t>());
    visit_width(self.itemsize(), [&]<class Element>() {
      launch(write_sorted<Element>, dim3(ceil_div<uint32_t>(n, kThreads)), dim3(kThreads), 0,
             static_cast<const Element*>(input.data()), sorted.data<uint32_t>(), rows, n,
             static_cast<Element*>(values.data()), indices.data_as<int64_t>());
    });
  }
}

const RegisterCuda registered([](KernelTable& t) { t.sort = sort; });

}  // namespace
}  // namespace vt::cuda
