// Permutations and weighted sampling.
#include <cstdio>
#include <cub/device/device_radix_sort.cuh>

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/philox.cuh"

namespace vt::cuda {
namespace {

/// Sorts `n` pairs by key, ascending and stable. The sorted values end in `values`.
void sort_pairs(const Launch& launch, uint64_t* keys, int64_t* values, int64_t n) {
  const Scratch other_keys(static_cast<size_t>(n) * 8, launch);
  const Scratch other_values(static_cast<size_t>(n) * 8, launch);
  cub::DoubleBuffer<uint64_t> key(keys, other_keys.data<uint64_t>());
  cub::DoubleBuffer<int64_t> value(values, other_values.data<int64_t>());
  size_t bytes = 0;
  const auto sort = [&](void* scratch) {
    check_cuda(
        cub::DeviceRadixSort::SortPairs(scratch, bytes, key, value, n, 0, 64, launch.stream()),
        "sorting");
  };
  sort(nullptr);
  const Scratch scratch(std::max<size_t>(bytes, 1), launch);
  sort(scratch.data());
  if (value.Current() != values)
    check_cuda(cudaMemcpyAsync(values, value.Current(), static_cast<size_t>(n) * 8,
                               cudaMemcpyDeviceToDevice, launch.stream()),
               "copying sorted values");
}

__global__ void __launch_bounds__(kBlock)
    permutation_keys_kernel(uint64_t* keys, int64_t* values, PhiloxState rng, int64_t n) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step) {
    const Philox4 bits = stream(static_cast<uint64_t>(i));
    keys[i] = wide(bits.value[0], bits.value[1]);
    values[i] = i;
  }
}

/// The order of random 64-bit keys: element i has that of counter i. (The CPU swaps in sequence, so
/// its permutation for the same seed is another.)
void randperm_(const Tensor& self, const PhiloxArgs& rng) {
  const int64_t n = self.numel();
  if (n == 0) return;
  const Launch launch(self.device());
  const Tensor order = self.dtype() == DType::Int64 && self.is_contiguous()
                           ? self
                           : vt::empty(self.sizes(), DType::Int64, self.device());
  const Scratch keys(static_cast<size_t>(n) * 8, launch);
  launch(permutation_keys_kernel, dim3(launch.fill(ceil_div<int64_t>(n, kBlock), kBlock)),
         dim3(kBlock), 0, keys.data<uint64_t>(), order.data_as<int64_t>(), PhiloxState(rng), n);
  sort_pairs(launch, keys.data<uint64_t>(), order.data_as<int64_t>(), n);
  if (!order.is_same(self)) copy(self, order, true);
}

__device__ inline double weight_at(const char* weights, DType dtype, int64_t itemsize, int64_t i) {
  const double w = load_as<double>(weights + i * itemsize, dtype);
  if (!(w >= 0) || isinf(w)) {
    printf(
        "multinomial: probability tensor contains either `inf`, `nan` or element < 0 (%g at "
        "element %lld)\n",
        w, static_cast<long long>(i));
    __trap();
  }
  return w;
}

/// The running sums of each row's weights; one block a row.
__global__ void __launch_bounds__(kBlock)
    cumulative_kernel(double* sums, const char* weights, DType dtype, int64_t itemsize,
                      int64_t categories) {
  __shared__ double warp_sums[kBlock / kWarp];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double before = 0;
  for (int64_t start = 0; start < categories; start += kBlock) {
    const int64_t c = start + threadIdx.x;
    double sum = c < categories ? weight_at(weights, dtype, itemsize, row * categories + c) : 0.0;
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const double left = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += left;
    }
    if (lane == kWarp - 1) warp_sums[warp] = sum;
    __syncthreads();
    double chunk = 0;
#pragma unroll
    for (int w = 0; w < kBlock / kWarp; ++w) {
      if (w == warp) sum += chunk;
      chunk += warp_sums[w];
    }
    if (c < categories) sums[row * categories + c] = before + sum;
    before += chunk;
    __syncthreads();  // warp_sums is written again
  }
  if (threadIdx.x == 0 && !(before > 0)) {
    printf(
        "multinomial: invalid multinomial distribution (sum of probabilities <= 0) in row %lld\n",
        static_cast<long long>(row));
    __trap();
  }
}

/// Each sample is looked up in the running sums.
__global__ void __launch_bounds__(kBlock)
    lookup_kernel(int64_t* out, const double* sums, const char* weights, DType dtype,
                  int64_t itemsize, int64_t categories, int64_t samples, PhiloxState rng,
                  int64_t n) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step) {
    const int64_t row = i / samples;
    const double* sum = sums + row * categories;
    const Philox4 bits = stream(static_cast<uint64_t>(i));
    const double x = open_uniform(wide(bits.value[0], bits.value[1])) * sum[categories - 1];
    int64_t low = 0, high = categories;  // the first category whose sum is above x
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sum[middle] > x)
        high = middle;
      else
        low = middle + 1;
    }
    low = min(low, categories - 1);
    while (low > 0 && load_as<double>(weights + (row * categories + low) * itemsize, dtype) == 0)
      --low;
    out[i] = low;
  }
}

/// An exponential race: each category's key is Exp(1) / weight, and the smallest keys win. Keys are
/// kept as their bits, which order like the (non-negative) numbers.
__global__ void __launch_bounds__(kBlock)
    race_keys_kernel(uint64_t* keys, int64_t* order, const char* weights, DType dtype,
                     int64_t itemsize, int64_t categories, PhiloxState rng, int64_t n) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step) {
    const double w = weight_at(weights, dtype, itemsize, i);
    const Philox4 bits = stream(static_cast<uint64_t>(i));
    const double u = open_uniform(wide(bits.value[0], bits.value[1]));
    // A weight too small for the quotient still precedes weights of 0.
    const double key = w > 0 ? fmin(-log(u) / w, 1.7976931348623157e308) : INFINITY;
    keys[i] = static_cast<uint64_t>(__double_as_longlong(key));
    if (order) order[i] = i % categories;
  }
}

constexpr uint64_t kInfinity = 0x7ff0000000000000;

__device__ inline void require_category(uint64_t key, int64_t row) {
  if (key < kInfinity) return;
  printf(
      "multinomial: invalid multinomial distribution (with replacement=False, not enough "
      "non-negative category to sample) in row %lld\n",
      static_cast<long long>(row));
  __trap();
}

/// The `samples` smallest keys of each row, in order: each pass finds the next after the last. One
/// block a row.
__global__ void __launch_bounds__(kBlock)
    winners_kernel(int64_t* out, const uint64_t* keys, int64_t categories, int64_t samples) {
  __shared__ uint64_t warp_key[kBlock / kWarp];
  __shared__ int64_t warp_category[kBlock / kWarp];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t* key = keys + row * categories;
  uint64_t last_key = 0;
  int64_t last = -1;
  const auto precedes = [](uint64_t a, int64_t i, uint64_t b, int64_t j) {
    return a < b || (a == b && i < j);
  };
  for (int64_t s = 0; s < samples; ++s) {
    uint64_t best = ~uint64_t{0};
    int64_t category = categories;
    for (int64_t c = threadIdx.x; c < categories; c += kBlock) {
      const uint64_t k = key[c];
      if (precedes(last_key, last, k, c) && precedes(k, c, best, category)) {
        best = k;
        category = c;
      }
    }
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
      const uint64_t k = __shfl_down_sync(0xffffffffu, best, d);
      const int64_t c = __shfl_down_sync(0xffffffffu, category, d);
      if (precedes(k, c, best, category)) {
        best = k;
        category = c;
      }
    }
    if (lane == 0) {
      warp_key[warp] = best;
      warp_category[warp] = category;
    }
    __syncthreads();
    best = warp_key[0];
    category = warp_category[0];
#pragma unroll
    for (int w = 1; w < kBlock / kWarp; ++w) {
      if (precedes(warp_key[w], warp_category[w], best, category)) {
        best = warp_key[w];
        category = warp_category[w];
      }
    }
    __syncthreads();  // the shared pairs are written again
    last_key = best;
    last = category;
    if (threadIdx.x == 0) {
      require_category(best, row);
      out[row * samples + s] = category;
    }
  }
}

/// The first `samples` of a sorted row.
__global__ void __launch_bounds__(kBlock)
    take_kernel(int64_t* out, const int64_t* order, const char* weights, DType dtype,
                int64_t itemsize, int64_t samples, int64_t row) {
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t s = int64_t{blockIdx.x} * kBlock + threadIdx.x; s < samples; s += step) {
    const int64_t category = order[s];
    // Categories of weight 0 come last.
    if (load_as<double>(weights + category * itemsize, dtype) == 0)
      require_category(kInfinity, row);
    out[s] = category;
  }
}

void multinomial(const Tensor& out, const Tensor& self, int64_t num_samples, bool replacement,
                 const PhiloxArgs& rng) {
  const int64_t categories = self.sizes().back();
  const int64_t rows = self.dim() == 1 ? 1 : self.sizes()[0];
  if (rows == 0) return;
  check(categories > 0, "invalid multinomial distribution (sum of probabilities <= 0)");
  const Launch launch(out.device());
  const Tensor source = contiguous(self);
  const auto* weights = source.data_as<char>();
  const DType dtype = source.dtype();
  const int64_t itemsize = source.itemsize(), n = rows * categories;
  auto* target = out.data_as<int64_t>();
  const auto blocks = [&](int64_t elements) {
    return dim3(static_cast<uint32_t>(launch.fill(ceil_div<int64_t>(elements, kBlock), kBlock)));
  };
  const dim3 row_blocks(static_cast<uint32_t>(rows));
  if (replacement) {
    const Scratch sums(static_cast<size_t>(n) * 8, launch);
    launch(cumulative_kernel, row_blocks, dim3(kBlock), 0, sums.data<double>(), weights, dtype,
           itemsize, categories);
    launch(lookup_kernel, blocks(rows * num_samples), dim3(kBlock), 0, target, sums.data<double>(),
           weights, dtype, itemsize, categories, num_samples, PhiloxState(rng), rows * num_samples);
    return;
  }
  constexpr int64_t kMostPasses = 64;
  const bool sort = num_samples > kMostPasses;
  const Scratch keys(static_cast<size_t>(n) * 8, launch);
  const Scratch order(sort ? static_cast<size_t>(n) * 8 : 1, launch);
  launch(race_keys_kernel, blocks(n), dim3(kBlock), 0, keys.data<uint64_t>(),
         sort ? order.data<int64_t>() : nullptr, weights, dtype, itemsize, categories,
         PhiloxState(rng), n);
  if (!sort) {
    launch(winners_kernel, row_blocks, dim3(kBlock), 0, target, keys.data<uint64_t>(), categories,
           num_samples);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* row_order = order.data<int64_t>() + row * categories;
    sort_pairs(launch, keys.data<uint64_t>() + row * categories, row_order, categories);
    launch(take_kernel, blocks(num_samples), dim3(kBlock), 0, target + row * num_samples, row_order,
           weights + row * categories * itemsize, dtype, itemsize, num_samples, row);
  }
}

const RegisterCuda registered([](KernelTable& t) {
  t._randperm_ = randperm_;
  t._multinomial = multinomial;
});

}  // namespace
}  // namespace vt::cuda
