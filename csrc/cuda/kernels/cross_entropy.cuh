// What the kernels of cross entropy with class indices share.
#pragma once

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

constexpr int kSumThreads = 512;

}  // namespace vt::cuda::cross_entropy
