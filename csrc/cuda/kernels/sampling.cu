// Permutations and weighted sampling.
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/philox.cuh"
#include "cuda/kernels/sort.cuh"

namespace vt::cuda {
namespace {

__global__ void __launch_bounds__(kBlock)
    permutation_keys_kernel(uint64_t* keys, uint32_t* places, PhiloxState rng, uint32_t n) {
  const PhiloxStream stream(rng);
  const uint64_t step = uint64_t{gridDim.x} * kBlock;
  for (uint64_t i = uint64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step) {
    const Philox4 bits = stream(i);
    keys[i] = wide(bits.value[0], bits.value[1]);
    places[i] = static_cast<uint32_t>(i);
  }
}

__global__ void __launch_bounds__(kBlock)
    store_places_kernel(char* out, DType dtype, int64_t stride, const uint32_t* places,
                        uint32_t n) {
  const uint64_t step = uint64_t{gridDim.x} * kBlock;
  for (uint64_t i = uint64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step)
    store_as<int64_t>(out + static_cast<int64_t>(i) * stride, dtype, places[i]);
}

/// Keys and the values they carry, before and after a sort.
struct SortBuffers {
  Scratch keys, sorted_keys, values, sorted_values;
  SortBuffers(int64_t n, const Launch& launch)
      : keys(static_cast<size_t>(n) * 8, launch),
        sorted_keys(static_cast<size_t>(n) * 8, launch),
        values(static_cast<size_t>(n) * 4, launch),
        sorted_values(static_cast<size_t>(n) * 4, launch) {}
};

dim3 blocks_for(const Launch& launch, int64_t elements) {
  return dim3(static_cast<uint32_t>(launch.fill(ceil_div<int64_t>(elements, kBlock), kBlock)));
}

/// The order of random 64-bit keys: element i has that of counter i. (The CPU swaps in sequence, so
/// its permutation for the same seed is another.)
void randperm_(const Tensor& self, const PhiloxArgs& rng) {
  const int64_t n = self.numel();
  if (n == 0) return;
  check(n < int64_t{1} << 32, "randperm: at most 2^32 - 1 elements on CUDA, got ", n);
  const Launch launch(self.device());
  const auto count = static_cast<uint32_t>(n);
  SortBuffers sort(n, launch);
  launch(permutation_keys_kernel, blocks_for(launch, n), dim3(kBlock), 0,
         sort.keys.data<uint64_t>(), sort.values.data<uint32_t>(), PhiloxState(rng), count);
  sort_pairs(launch, sort.keys.data<uint64_t>(), sort.sorted_keys.data<uint64_t>(),
             sort.values.data<uint32_t>(), sort.sorted_values.data<uint32_t>(), n, 64);
  launch(store_places_kernel, blocks_for(launch, n), dim3(kBlock), 0, self.data_as<char>(),
         self.dtype(), self.stride(0) * self.itemsize(), sort.sorted_values.data<uint32_t>(),
         count);
}

__device__ inline double weight_at(const char* weights, DType dtype, int64_t itemsize, int64_t i,
                                   FailureSlot* failure) {
  const double w = load_as<double>(weights + i * itemsize, dtype);
  if (!(w >= 0) || isinf(w))
    stop_kernel(failure, FailedCheck::MultinomialWeight, i, __double_as_longlong(w));
  return w;
}

/// The running sums of each row's weights; one block a row.
__global__ void __launch_bounds__(kBlock)
    cumulative_kernel(double* sums, const char* weights, DType dtype, int64_t itemsize,
                      int64_t categories, FailureSlot* failure) {
  __shared__ double warp_sums[kBlock / kWarp];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double before = 0;
  for (int64_t start = 0; start < categories; start += kBlock) {
    const int64_t c = start + threadIdx.x;
    double sum =
        c < categories ? weight_at(weights, dtype, itemsize, row * categories + c, failure) : 0.0;
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
  if (threadIdx.x == 0 && !(before > 0))
    stop_kernel(failure, FailedCheck::MultinomialSum, row, categories);
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
/// kept as their bits, which order like the (non-negative) numbers. With `places`, the categories
/// are listed for a sort.
__global__ void __launch_bounds__(kBlock)
    race_keys_kernel(uint64_t* keys, uint32_t* places, const char* weights, DType dtype,
                     int64_t itemsize, PhiloxState rng, int64_t first, int64_t n,
                     FailureSlot* failure) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += step) {
    const double w = weight_at(weights, dtype, itemsize, first + i, failure);
    const Philox4 bits = stream(static_cast<uint64_t>(first + i));
    const double u = open_uniform(wide(bits.value[0], bits.value[1]));
    // A weight too small for the quotient still precedes weights of 0.
    const double key = w > 0 ? fmin(-log(u) / w, 1.7976931348623157e308) : INFINITY;
    keys[i] = static_cast<uint64_t>(__double_as_longlong(key));
    if (places) places[i] = static_cast<uint32_t>(i);
  }
}

constexpr uint64_t kInfinity = 0x7ff0000000000000;

__device__ inline void require_category(uint64_t key, int64_t row, FailureSlot* failure) {
  if (key >= kInfinity) stop_kernel(failure, FailedCheck::MultinomialCategories, row, 0);
}

/// The `samples` smallest keys of each row, in order: each pass finds the next after the last. One
/// block a row.
__global__ void __launch_bounds__(kBlock)
    winners_kernel(int64_t* out, const uint64_t* keys, int64_t categories, int64_t samples,
                   FailureSlot* failure) {
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
      require_category(best, row, failure);
      out[row * samples + s] = category;
    }
  }
}

/// The first `samples` of a sorted row.
__global__ void __launch_bounds__(kBlock)
    take_kernel(int64_t* out, const uint32_t* places, const uint64_t* keys, int64_t samples,
                int64_t row, FailureSlot* failure) {
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t s = int64_t{blockIdx.x} * kBlock + threadIdx.x; s < samples; s += step) {
    require_category(keys[s], row, failure);
    out[s] = places[s];
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
  const dim3 row_blocks(static_cast<uint32_t>(rows));
  FailureSlot* failure = failure_slot(launch.device());
  if (replacement) {
    const Scratch sums(static_cast<size_t>(n) * 8, launch);
    launch(cumulative_kernel, row_blocks, dim3(kBlock), 0, sums.data<double>(), weights, dtype,
           itemsize, categories, failure);
    launch(lookup_kernel, blocks_for(launch, rows * num_samples), dim3(kBlock), 0, target,
           sums.data<double>(), weights, dtype, itemsize, categories, num_samples, PhiloxState(rng),
           rows * num_samples);
    return;
  }
  constexpr int64_t kMostPasses = 64;
  if (num_samples <= kMostPasses) {
    const Scratch keys(static_cast<size_t>(n) * 8, launch);
    launch(race_keys_kernel, blocks_for(launch, n), dim3(kBlock), 0, keys.data<uint64_t>(), nullptr,
           weights, dtype, itemsize, PhiloxState(rng), int64_t{0}, n, failure);
    launch(winners_kernel, row_blocks, dim3(kBlock), 0, target, keys.data<uint64_t>(), categories,
           num_samples, failure);
    return;
  }
  check(categories < int64_t{1} << 32, "multinomial: at most 2^32 - 1 categories on CUDA, got ",
        categories);
  SortBuffers sort(categories, launch);
  for (int64_t row = 0; row < rows; ++row) {
    launch(race_keys_kernel, blocks_for(launch, categories), dim3(kBlock), 0,
           sort.keys.data<uint64_t>(), sort.values.data<uint32_t>(), weights, dtype, itemsize,
           PhiloxState(rng), row * categories, categories, failure);
    sort_pairs(launch, sort.keys.data<uint64_t>(), sort.sorted_keys.data<uint64_t>(),
               sort.values.data<uint32_t>(), sort.sorted_values.data<uint32_t>(), categories, 64);
    launch(take_kernel, blocks_for(launch, num_samples), dim3(kBlock), 0,
           target + row * num_samples, sort.sorted_values.data<uint32_t>(),
           sort.sorted_keys.data<uint64_t>(), num_samples, row, failure);
  }
}

const RegisterCuda registered([](KernelTable& t) {
  t._randperm_ = randperm_;
  t._multinomial = multinomial;
});

}  // namespace
}  // namespace vt::cuda
