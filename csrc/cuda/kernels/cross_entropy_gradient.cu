// Loss and gradient of cross entropy with class indices in one op, the gradient in the place of the
// logits where asked. A row is read once and written once: rows of few classes lie in shared memory
// by the tile (cross_entropy_tiles.cu), long ones wait there while the next row arrives. Other rows
// are read twice.
#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

using namespace cross_entropy;

// --- the sum of weights

/// The sum of the rows' weights, by one block in the order of total_loss.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_weights(T* total_weight, Problem<T> p) {
  __shared__ T shared[kSumThreads / kWarp];
  T total = T(0);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.rows; i += kSumThreads) {
    const int64_t target = p.targets[i];
    if (target == p.ignored) continue;
    if (target < 0 || target >= p.classes)
      stop_kernel(p.failure, FailedCheck::CrossEntropy, target, p.classes);
    total += p.weight[target];
  }
  total = row_reduce(total, Plus(), shared);
  if (threadIdx.x == 0) *total_weight = total;
}

/// The same without weights: how many rows count.
constexpr int kCountThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kCountThreads) count_targets(T* total_weight, Problem<T> p) {
  constexpr int kBatch = 8;  // loads under way
  __shared__ int shared[kCountThreads / kWarp];
  int count = 0;
  for (int64_t first = threadIdx.x; first < p.rows; first += kCountThreads * kBatch) {
    int64_t target[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t i = first + k * kCountThreads;
      target[k] = i < p.rows ? p.targets[i] : p.ignored;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (target[k] == p.ignored) continue;
      if (target[k] < 0 || target[k] >= p.classes)
        stop_kernel(p.failure, FailedCheck::CrossEntropy, target[k], p.classes);
      ++count;
    }
  }
  count = row_reduce(count, Plus(), shared);
  if (threadIdx.x == 0) *total_weight = static_cast<T>(count);
}

// --- long rows

constexpr int kStageThreads = 512;

__device__ inline void copy_async(void* shared, const void* global) {
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(global) : "memory");
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `left` of the groups begun by this thread are under way.
template <int left>
__device__ inline void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

/// exp(x), good to a few units of 1e-7 of itself for the x of a softmax; 16-bit floats keep less.
template <class S>
__device__ inline float quick_exp(float x) {
  if constexpr (sizeof(S) > 2) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

/// Stores 16 bytes, zeros unless `kept`; two 16-bit floats are rounded by one instruction.
__device__ inline void store_rounded(float* p, const float (&x)[4], bool kept) {
  *reinterpret_cast<float4*>(p) =
      kept ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.f, 0.f, 0.f, 0.f);
}
__device__ inline __nv_bfloat162 pair_of(__nv_bfloat16, float a, float b) {
  return __floats2bfloat162_rn(a, b);
}
__device__ inline __half2 pair_of(__half, float a, float b) { return __floats2half2_rn(a, b); }
template <class S>
__device__ inline void store_rounded(S* p, const float (&x)[8], bool kept) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = pair_of(S(), x[2 * i], x[2 * i + 1]);
    pairs[i] = kept ? *reinterpret_cast<const uint32_t*>(&pair) : 0u;
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/// A block takes rows in turn. A thread owns every 512th piece of 16 bytes of a row, in shared
/// memory from when it arrives until the gradient is written; the piece of the next row is asked
/// for then. Nobody else reads a thread's pieces, so the copies need no barrier.
template <class S, int Pieces, int BlocksPerSm>
__global__ void __launch_bounds__(kStageThreads, BlocksPerSm)
    staged_rows(const __grid_constant__ Rows<S> r) {
  constexpr int W = kWidthOf<S>, kWarps = kStageThreads / kWarp;
  extern __shared__ uint4 stage[];
  __shared__ float tops[kWarps], totals[kWarps], alongs[kWarps], logit;
  const Problem<float>& p = r.problem;
  const bool smooth = p.smoothing != 0.f;
  const int pieces = static_cast<int>(p.classes / W), t = static_cast<int>(threadIdx.x);
  const int warp = t / kWarp;
  uint4* const mine = stage + t;
  const int64_t step = gridDim.x;
  const float divisor = r.total_weight ? *r.total_weight : 1.f;
  const float scale_of_all = r.grad_per_row ? 0.f : r.grad[0] / divisor;

  int64_t row = blockIdx.x;
  int64_t target = row < p.rows ? p.targets[row] : p.ignored;
#pragma unroll
  for (int k = 0; k < Pieces; ++k) {
    const int at = k * kStageThreads + t;
    if (row < p.rows && at < pieces)
      copy_async(mine + k * kStageThreads, r.in + row * p.classes + at * W);
    end_group();
  }
  for (; row < p.rows; row += step) {
    const bool more = row + step < p.rows, kept = target != p.ignored;
    const int64_t next_target = more ? p.targets[row + step] : p.ignored;
    const int marked = kept ? static_cast<int>(target / W) : -1;  // the piece with the target
    const int within = static_cast<int>(target % W);
    const float scale = r.grad_per_row ? r.grad[row] / divisor : scale_of_all;
    float lse = 0.f, on_target = 0.f, factor = 0.f, elsewhere = 0.f;
    if (kept) {
      float top = minus_infinity<float>(), total = 0.f, along = 0.f;
#pragma unroll
      for (int k = 0; k < Pieces; ++k) {
        wait_groups<Pieces - 1>();  // a row's groups, and one for each turn of this loop
        const int at = k * kStageThreads + t;
        if (at < pieces) {
          float x[W];
          load_piece<S, float, W>(reinterpret_cast<const S*>(mine + k * kStageThreads), x);
          float largest = top;
#pragma unroll
          for (int i = 0; i < W; ++i) largest = fmaxf(largest, x[i]);
          const float by = OnlineSum<float>::shift(largest);
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < W; ++i) sum += quick_exp<S>(x[i] - by);
          total = total * quick_exp<S>(top - by) + sum;
          top = largest;
          if (at == marked) {
#pragma unroll
            for (int i = 0; i < W; ++i) {
              if (i == within) logit = x[i];
            }
          }
        }
        end_group();
      }
      if (smooth) {
        for (int k = 0, at = t; at < pieces; ++k, at += kStageThreads) {
          float x[W];
          load_piece<S, float, W>(reinterpret_cast<const S*>(mine + k * kStageThreads), x);
#pragma unroll
          for (int i = 0; i < W; ++i) along += x[i];
        }
      }
      // Over the block: the largest first, then the sums against it. The arrays of one are written
      // only after the barrier of the other, so two barriers a row are enough.
      float all = top;
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2)
        all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, mask));
      if (t % kWarp == 0) tops[warp] = all;
      __syncthreads();
      all = tops[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) all = fmaxf(all, tops[w]);
      const float at_target = logit;
      total *= quick_exp<S>(top - OnlineSum<float>::shift(all));
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, mask);
      if (smooth) {
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2)
          along += __shfl_xor_sync(0xffffffffu, along, mask);
      }
      if (t % kWarp == 0) totals[warp] = total, alongs[warp] = along;
      __syncthreads();
      total = totals[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) total += totals[w];
      if (smooth) {
        along = alongs[0];
        for (int w = 1; w < kWarps; ++w) along += alongs[w];
      }
      lse = all + logf(total);
      const RowGradient<float> g(p, 1.f, static_cast<float>(p.classes), scale);
      factor = g.factor, elsewhere = g.elsewhere, on_target = g.on_target;
      if (t == 0)
        r.losses[row] = row_loss(p, 1.f, static_cast<float>(p.classes), lse, at_target, along);
    } else {
      wait_groups<0>();  // before their places are given to the next row
      if (t == 0) r.losses[row] = 0.f;
    }
    S* const dx = r.out + row * p.classes;
    const S* const ahead = r.in + (row + step) * p.classes;
#pragma unroll
    for (int k = 0; k < Pieces; ++k) {
      const int at = k * kStageThreads + t;
      if (at < pieces) {
        float x[W];
        load_piece<S, float, W>(reinterpret_cast<const S*>(mine + k * kStageThreads), x);
#pragma unroll
        for (int i = 0; i < W; ++i) x[i] = quick_exp<S>(x[i] - lse) * factor - elsewhere;
        if (at == marked) {
#pragma unroll
          for (int i = 0; i < W; ++i) {
            if (i == within) x[i] -= on_target;
          }
        }
        store_rounded(dx + at * W, x, kept);
        if (more) copy_async(mine + k * kStageThreads, ahead + at * W);
      }
      end_group();
    }
    target = next_target;
  }
  wait_groups<0>();
}

/// Launches staged_rows; false where a row does not fit or does not lie in pieces of 16 bytes.
template <class S>
bool staged(const Launch& launch, const Rows<S>& r) {
  constexpr int W = kWidthOf<S>;
  constexpr int64_t kLeast = 4 * kStageThreads;  // pieces of a row that a block is worth
  if constexpr (sizeof(S) == 8) return false;
  const int64_t classes = r.problem.classes, pieces = ceil_div<int64_t>(classes, W * kStageThreads);
  const int64_t bytes = pieces * kStageThreads * 16, most = launch.properties().shared_memory_per_block;
  if (r.problem.weight || classes % W != 0 || classes / W < kLeast || pieces > 28 ||
      !is_aligned(r.in) || !is_aligned(r.out) || bytes + 1024 > most)
    return false;
  const auto go = [&](auto kernel, int64_t wanted) {
    // Beside the kernel's own, even 48 KiB are more than it may take unasked.
    allow_shared_memory(kernel, static_cast<int>(bytes) + 512);
    // A block has 1 KiB of shared memory to itself beside what it asks for.
    const int64_t together = std::max<int64_t>(1, std::min(wanted, (most + 1024) / (bytes + 1024 + 512)));
    const int64_t blocks = std::min(r.problem.rows, together * launch.properties().multiprocessors);
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStageThreads), static_cast<size_t>(bytes), r);
  };
  if constexpr (sizeof(S) != 8) {
    if (pieces <= 8)
      go(staged_rows<S, 8, 3>, 3);
    else if (pieces <= 13)
      go(staged_rows<S, 13, 2>, 2);
    else
      go(staged_rows<S, 28, 1>, 1);
  }
  return true;
}

// --- other rows

/// The rows of a warp or a block each, read twice: a thread writes the pieces that it read itself.
template <class S, int W>
__global__ void __launch_bounds__(kRowThreads) walked_rows(const __grid_constant__ Rows<S> r) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  const Problem<T>& p = r.problem;
  const bool smooth = p.smoothing != T(0);
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t target = p.targets[row];
    const S* x = r.in + row * p.classes;
    S* dx = r.out + row * p.classes;
    if (target == p.ignored) {
      if (threadIdx.x == 0) r.losses[row] = T(0);
      for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
        T zeros[width];
#pragma unroll
        for (int k = 0; k < width; ++k) zeros[k] = T(0);
        store_piece<S, T, width>(dx + i, zeros);
      });
      continue;
    }
    // Every thread has read the target's logit before the reductions below let one write.
    const T at_target = convert<T>(x[target]);
    OnlineSum<T> sum;
    T along = T(0);
    for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
      T value[width];
      load_piece<S, T, width>(x + i, value);
      sum.add(value);
      if (smooth) {
#pragma unroll
        for (int k = 0; k < width; ++k) along += p.weight ? value[k] * p.weight[i + k] : value[k];
      }
    });
    sum.reduce(shared);
    __syncwarp();
    const T lse = sum.top + log_of(sum.total);
    const T weight = p.weight ? p.weight[target] : T(1);
    const T all_weights = smooth ? weight_sum(p, shared) : T(0);
    if (smooth) along = row_reduce(along, Plus(), shared);
    if (threadIdx.x == 0) r.losses[row] = row_loss(p, weight, all_weights, lse, at_target, along);
    const RowGradient<T> g(p, weight, all_weights, r.scale(row));
    for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
      T value[width];
      load_piece<S, T, width>(x + i, value);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        value[k] = g.of(p, value[k], lse, i + k, target);
      }
      store_piece<S, T, width>(dx + i, value);
    });
  }
}

template <class S>
void walked(const Launch& launch, const Rows<S>& r) {
  const LogitLaunch shape(r.problem.rows, r.problem.classes);
  const bool together = is_aligned(r.in) && is_aligned(r.out);
  launch(together || sizeof(S) == 8 ? walked_rows<S, kWidthOf<S>> : walked_rows<S, 1>, shape.grid,
         shape.block, 0, r);
}

// --- the losses

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    mean_loss(char* loss, DType dtype, const T* total_weight, const T* losses, int64_t rows) {
  __shared__ T shared[kSumThreads / kWarp];
  T sum = T(0);
#pragma unroll 16
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) sum += losses[i];
  sum = row_reduce(sum, Plus(), shared);
  if (threadIdx.x == 0) store_as(loss, dtype, total_weight ? sum / *total_weight : sum);
}

__global__ void store_each(char* out, DType dtype, const char* losses, DType computed, int64_t rows) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= rows) return;
  const int64_t size = dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
  const int64_t from = computed == DType::Float64 ? 8 : 4;
  store_as(out + i * size, dtype, load_as<double>(losses + i * from, computed));
}

void loss_and_gradient(const Tensor& loss, const Tensor& grad, const Tensor& self,
                       const Tensor& target, const Tensor& weight, int64_t reduction,
                       int64_t ignore_index, double smoothing, const Tensor& grad_output, DType) {
  const Launch launch(self.device());
  const Tensor x = dense(self), index = dense_as(target, DType::Int64);
  visit_float_storage(self.dtype(), [&]<class S>() {
    using T = Compute<S>;
    const Tensor w = dense_as(weight, DTypeOf<T>::value),
                 g = dense_as(grad_output, DTypeOf<T>::value);
    const auto p = problem<T>(self, index, w, ignore_index, smoothing);
    const Scratch each(static_cast<size_t>(p.rows + 1) * sizeof(T), launch);
    T* losses = each.data<T>();
    T* total = losses + p.rows;
    if (p.weight)
      launch(sum_weights<T>, dim3(1), dim3(kSumThreads), 0, total, p);
    else
      launch(count_targets<T>, dim3(1), dim3(kCountThreads), 0, total, p);
    if (reduction != kMean) total = nullptr;
    if (self.numel() > 0) {
      const Rows<S> rows{losses,          grad.data_as<S>(), x.data_as<S>(),
                         g.data_as<T>(), total,             reduction == kNone,
                         p};
      if (!tiled_gradients(launch, rows) && !staged(launch, rows)) walked(launch, rows);
    }
    if (reduction != kNone) {
      launch(mean_loss<T>, dim3(1), dim3(kSumThreads), 0, static_cast<char*>(loss.data()),
             loss.dtype(), total, losses, p.rows);
    } else if (p.rows > 0) {
      launch(store_each, dim3(static_cast<unsigned>(ceil_div<int64_t>(p.rows, 256))), dim3(256), 0,
             static_cast<char*>(loss.data()), loss.dtype(), reinterpret_cast<const char*>(losses),
             DTypeOf<T>::value, p.rows);
    }
  });
}

const RegisterCuda registered(
    [](KernelTable& t) { t._cross_entropy_index_gradient = loss_and_gradient; });

}  // namespace
}  // namespace vt::cuda
