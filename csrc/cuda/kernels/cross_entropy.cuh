// What the kernels of cross entropy with class indices share.
#pragma once

#include "cuda/kernels/activation_math.cuh"
#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/rows.cuh"

namespace vt::cuda::cross_entropy {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

template <class T>
struct Problem {
  const int64_t* targets;
  const T* weight;  // of classes; may be null
  int64_t rows, classes, ignored;
  T smoothing;
  FailureSlot* failure;
};

template <class T>
Problem<T> problem(const Tensor& self, const Tensor& target, const Tensor& weight,
                   int64_t ignore_index, double smoothing) {
  return {target.data_as<int64_t>(), weight.defined() ? weight.data_as<T>() : nullptr,
          self.sizes()[0],           self.sizes()[1],
          ignore_index,              static_cast<T>(smoothing),
          failure_slot(self.device().index)};
}

/// The sum of all class weights, by the threads of a row.
template <class T>
__device__ inline T weight_sum(const Problem<T>& p, T* shared) {
  if (!p.weight) return static_cast<T>(p.classes);
  T sum = T(0);
  for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) sum += p.weight[c];
  return row_reduce(sum, Plus(), shared);
}

/// How rows of logits are spread: longer than a warp can take in a few steps, a block each.
struct LogitLaunch : RowLaunch {
  LogitLaunch(int64_t rows, int64_t classes) : RowLaunch(rows, classes, 32) {}
};

/// How a row's loss and gradient follow from its log-sum-exp. Roundings are spelled out: eager's two
/// ops and the one that gives loss and gradient together agree bit for bit where their sums do.
template <class T>
struct RowGradient {
  T factor, elsewhere, on_target;

  /// `all_weights`: the sum of the classes' weights; used with smoothing only.
  __device__ RowGradient(const Problem<T>& p, T weight, T all_weights, T scale)
      : on_target(times(times(weight, T(1) - p.smoothing), scale)) {
    const T spread = p.smoothing / static_cast<T>(p.classes);
    factor = p.smoothing != T(0) ? times_plus(times(spread, all_weights), scale, on_target) : on_target;
    elsewhere = times(spread, scale);
  }

  /// The gradient of logit `x` of class `i`.
  __device__ T of(const Problem<T>& p, T x, T lse, int64_t i, int64_t target) const {
    T less = i == target ? on_target : T(0);
    if (p.smoothing != T(0))
      less = p.weight ? times_plus(elsewhere, p.weight[i], less) : plus(elsewhere, less);
    return times_plus(exp_of(x - lse), factor, -less);
  }
};

/// `along`: the sum of the row's logits, weighted; used with smoothing only.
template <class T>
__device__ inline T row_loss(const Problem<T>& p, T weight, T all_weights, T lse, T at_target,
                             T along) {
  const T loss = times(times(T(1) - p.smoothing, weight), plus(lse, -at_target));
  if (p.smoothing == T(0)) return loss;
  const T spread = p.smoothing / static_cast<T>(p.classes);
  return times_plus(spread, times_plus(all_weights, lse, -along), loss);
}

/// What the kernels of rows write and read. `out` may be `in`. Targets have been checked.
template <class S>
struct Rows {
  using T = Compute<S>;
  T* losses;
  S* out;
  const S* in;
  const T* grad;
  const T* total_weight;  // null unless the loss is a mean
  bool grad_per_row;
  Problem<T> problem;

  __device__ T scale(int64_t row) const {
    return grad[grad_per_row ? row : 0] / (total_weight ? *total_weight : T(1));
  }
};

constexpr int kSumThreads = 512;

/// Rows of few classes (cross_entropy_tiles.cu), of S in float, double, __half, __nv_bfloat16. False,
/// with nothing done, where a tile of rows does not fit or does not lie at 16 bytes.
template <class S>
bool tiled_losses(const Launch& launch, Compute<S>* losses, Compute<S>* weights, Compute<S>* lses,
                  const S* in, const Problem<Compute<S>>& problem);
template <class S>
bool tiled_gradients(const Launch& launch, const Rows<S>& rows);

}  // namespace vt::cuda::cross_entropy
