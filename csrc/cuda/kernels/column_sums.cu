// Sums over rows at the speed of memory: a block takes whole rows, or wide strips of them, and keeps
// eight accesses a thread in flight.
#include "cuda/kernels/column_sums.cuh"

#include <limits>

#include "core/tensor_lists.h"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kLines = 16;

/// 32 columns of one result a block; a line of threads takes every 16th part.
template <class T>
__device__ inline void add_strip(const ColumnParts<T>& result, int64_t strip, int64_t n, int blocks,
                                 T scale) {
  __shared__ T shared[kLines][kWarp];
  const int64_t column = strip * kWarp + threadIdx.x;
  T total = T(0);
  if (column < n) {
    const T* part = result.parts + column;
#pragma unroll 8
    for (int b = threadIdx.y; b < blocks; b += kLines) total += part[b * n];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= n) return;
  T sum[1] = {T(0)};
#pragma unroll
  for (int line = 0; line < kLines; ++line) sum[0] += shared[line][threadIdx.x];
  sum[0] *= scale;
  result.out.template store<1>(column, sum);
}

template <class T>
__global__ void __launch_bounds__(kWarp* kLines)
    add_parts(const __grid_constant__ ColumnPartsList<T> list, int64_t n, int blocks) {
  add_strip<T>(list.results[blockIdx.y], blockIdx.x, n, blocks, list.scale);
}

/// The results of one launch, of several lengths and numbers of parts.
template <class T>
struct PartsTable {
  static constexpr int kMost = 192;
  int count = 0;
  ColumnParts<T> results[kMost];
  int64_t n[kMost];
  int32_t blocks[kMost];
  int32_t first_strip[kMost + 1];  // of all strips of the launch

  __device__ int find(int strip) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_strip[middle] <= strip)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

template <class T>
__global__ void __launch_bounds__(kWarp* kLines)
    add_all_parts(const __grid_constant__ PartsTable<T> table) {
  const int k = table.find(static_cast<int>(blockIdx.x));
  add_strip<T>(table.results[k], blockIdx.x - table.first_strip[k], table.n[k], table.blocks[k],
               T(1));
}

/// Those of the list whose parts are in T.
template <class T>
void add_all(const Launch& launch, TensorSpan self, TensorSpan parts) {
  PartsTable<T> table;
  int64_t strips = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    table.first_strip[table.count] = static_cast<int32_t>(strips);
    launch(add_all_parts<T>, dim3(static_cast<unsigned>(strips)), dim3(kWarp, kLines), 0, table);
    table.count = 0;
    strips = 0;
  };
  for (size_t i = 0; i < self.size(); ++i) {
    const int64_t n = self[i].numel(), more = ceil_div<int64_t>(n, kWarp);
    if (n == 0 || parts[i].dtype() != DTypeOf<T>::value) continue;
    const int64_t rows = parts[i].sizes()[0];
    constexpr int64_t kMostOf = std::numeric_limits<int32_t>::max();
    check(more <= kMostOf && rows <= kMostOf, "_add_parts_: too many parts, of shape ",
          parts[i].sizes());
    if (table.count == PartsTable<T>::kMost || strips + more > kMostOf) flush();
    const int k = table.count++;
    table.results[k] = {Elements(self[i]), parts[i].data_as<T>()};
    table.n[k] = n;
    table.blocks[k] = static_cast<int32_t>(rows);
    table.first_strip[k] = static_cast<int32_t>(strips);
    strips += more;
  }
  flush();
}

void add_parts_of_all(TensorSpan self, TensorSpan parts) {
  check_parts(self, parts);
  if (self.empty()) return;
  const Launch launch(self[0].device());
  add_all<float>(launch, self, parts);
  add_all<double>(launch, self, parts);
}

/// Calls f with the storage type of a 16- or 32-bit float.
template <class F>
void visit_narrow_float(DType dtype, const F& f) {
  if (dtype == DType::Float16)
    f.template operator()<__half>();
  else if (dtype == DType::BFloat16)
    f.template operator()<__nv_bfloat16>();
  else
    f.template operator()<float>();
}

constexpr int kThreads = 512;
constexpr int kUnroll = 8;

__device__ inline float float_of(uint32_t bits, __nv_bfloat16) {
  return __uint_as_float(bits << 16);
}
__device__ inline float float_of(uint32_t bits, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline float float_of(uint32_t bits, float) { return __uint_as_float(bits); }

/// Element k of the bits of one element, or of 16 bytes of them.
template <class S>
__device__ inline float element(uint32_t bits, int) {
  return float_of(bits, S());
}
template <class S>
__device__ inline float element(const uint4& bits, int k) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  if constexpr (sizeof(S) == 4) return float_of(words[k], S());
  const uint32_t word = words[k / 2];
  return float_of(k % 2 == 0 ? word & 0xffff : word >> 16, S());
}

/// blockDim.x threads of W columns across, blockDim.y rows down; a block sums `per_block` rows of its
/// strip into parts[blockIdx.y]; blockIdx.z is the matrix of a batch.
template <class S, int W>
__global__ void __launch_bounds__(kThreads, 2)
    sum_rows(float* parts, const S* data, int64_t rows, int64_t n, int64_t stride,
             int64_t per_block, int64_t batch_stride) {
  using Bits = std::conditional_t<W != 1, uint4,
                                  std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>>;
  __shared__ float shared[kThreads * W];
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * W;
  const int64_t begin = blockIdx.y * per_block,
                end = begin + per_block < rows ? begin + per_block : rows;
  float total[W];
#pragma unroll
  for (int k = 0; k < W; ++k) total[k] = 0;
  if (column < n) {
    const S* from = data + blockIdx.z * batch_stride + column;
    for (int64_t row = begin + threadIdx.y; row < end; row += kUnroll * blockDim.y) {
      // Loaded as bits: as elements they would be taken apart at once, one row after the other.
      Bits loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = row + u * blockDim.y;
        loaded[u] = {};
        if (at < end) loaded[u] = *reinterpret_cast<const Bits*>(from + at * stride);
      }
      // The eight rows make a sum of their own first: shorter chains, smaller rounding errors.
#pragma unroll
      for (int k = 0; k < W; ++k) {
        float some = 0;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) some += element<S>(loaded[u], k);
        total[k] += some;
      }
    }
  }
  float* const line = shared + threadIdx.y * blockDim.x * W;
#pragma unroll
  for (int k = 0; k < W; ++k) line[threadIdx.x * W + k] = total[k];
  __syncthreads();
  const int across = blockDim.x * W;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < across;
       i += blockDim.x * blockDim.y) {
    const int64_t at = int64_t{blockIdx.x} * across + i;
    if (at >= n) break;
    float sum = 0;
    for (unsigned y = 0; y < blockDim.y; ++y) sum += shared[y * across + i];
    parts[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * n + at] = sum;
  }
}

template <class T>
void add(const Launch& launch, const ColumnPartsList<T>& list, int64_t n, int64_t blocks) {
  if (list.count == 0) return;
  launch(add_parts<T>,
         dim3(static_cast<unsigned>(ceil_div<int64_t>(n, kWarp)), static_cast<unsigned>(list.count)),
         dim3(kWarp, kLines), 0, list, n, static_cast<int>(blocks));
}

}  // namespace

void add_column_parts(const Launch& launch, const ColumnPartsList<float>& list, int64_t n,
                      int64_t blocks) {
  add(launch, list, n, blocks);
}
void add_column_parts(const Launch& launch, const ColumnPartsList<double>& list, int64_t n,
                      int64_t blocks) {
  add(launch, list, n, blocks);
}

void clear_rows(const Tensor& matrix, int64_t first, const Launch& launch) {
  const int64_t rows = matrix.sizes()[0] - first;
  if (rows <= 0 || matrix.numel() == 0) return;
  const int64_t row_bytes = matrix.sizes()[1] * matrix.itemsize();
  check_cuda(cudaMemsetAsync(static_cast<char*>(matrix.data()) + first * row_bytes, 0,
                             static_cast<size_t>(rows * row_bytes), launch.stream()),
             "clearing parts of a sum");
}

namespace {

/// How a matrix of n columns is spread over threads.
template <class S>
struct SumShape {
  static constexpr int kWide = kWidthOf<S>;
  bool wide;
  int64_t strips, across, down;

  SumShape(const ColumnSums& p, int64_t batch_stride) {
    wide = p.n % kWide == 0 && p.stride % kWide == 0 && batch_stride % kWide == 0 &&
           is_aligned(p.data.data);
    const int64_t lanes = p.n / (wide ? kWide : 1);  // threads a row
    strips = std::max<int64_t>(1, ceil_div<int64_t>(lanes, kThreads));
    across = std::max<int64_t>(1, ceil_div<int64_t>(lanes, strips));
    down = kThreads / across;
  }
  void run(const Launch& launch, const ColumnSums& p, float* out, int64_t parts,
           int64_t per_block, int64_t batch, int64_t batch_stride) const {
    launch(wide ? sum_rows<S, kWide> : sum_rows<S, 1>,
           dim3(static_cast<unsigned>(strips), static_cast<unsigned>(parts),
                static_cast<unsigned>(batch)),
           dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), 0, out,
           reinterpret_cast<const S*>(p.data.data), p.rows, p.n, p.stride, per_block, batch_stride);
  }
};

}  // namespace

void column_sums(const Launch& launch, const ColumnSums& p) {
  visit_narrow_float(p.data.dtype, [&]<class S>() {
    const SumShape<S> shape(p, 0);
    const auto [wide, strips, across, down] = shape;
    // 64 registers a thread: 1024 threads fill a multiprocessor.
    const int64_t per_sm = 2 * kThreads / (ceil_div<int64_t>(across * down, kWarp) * kWarp);
    const int64_t wanted =
        std::max<int64_t>(1, launch.properties().multiprocessors * per_sm / strips);
    const int64_t per_block = std::max<int64_t>(ceil_div(p.rows, std::min<int64_t>(wanted, 65535)),
                                                kUnroll * down);
    const int64_t blocks = std::max<int64_t>(1, ceil_div(p.rows, per_block));
    const Scratch parts(static_cast<size_t>(blocks * p.n) * sizeof(float), launch);
    shape.run(launch, p, parts.data<float>(), blocks, per_block, 1, 0);
    ColumnPartsList<float> list;
    list.results[0] = {p.out, parts.data<float>()};
    list.count = 1;
    list.scale = p.scale;
    add_column_parts(launch, list, p.n, blocks);
  });
}

void column_sums_in_parts(const Launch& launch, const ColumnSums& p, float* out, int64_t parts,
                          int64_t batch, int64_t batch_stride) {
  visit_narrow_float(p.data.dtype, [&]<class S>() {
    SumShape<S>(p, batch_stride)
        .run(launch, p, out, parts, ceil_div(p.rows, parts), batch, batch_stride);
  });
}

namespace {
const RegisterCuda registered([](KernelTable& t) { t._add_parts_ = add_parts_of_all; });
}  // namespace

}  // namespace vt::cuda
