// Cross entropy of rows of logits with class indices: forward reads the logits once for a running
// log-sum-exp a row, backward writes softmax - onehot straight from the logits. No (N, C) array is
// kept between the two. The rows' losses are summed by one block in a fixed order.
#include "cuda/cute/arguments.h"
#include "cuda/cute/launch_table.h"
#include "cuda/kernels/cross_entropy.cuh"

namespace vt::cuda {
namespace {

using namespace cross_entropy;

/// losses and weights, each `rows`: of every row, 0 for ignored ones.
template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    row_losses(Compute<S>* losses, Compute<S>* weights, Compute<S>* lses, const S* in,
               Problem<Compute<S>> p) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t target = p.targets[row];
    if (target == p.ignored) {
      if (threadIdx.x == 0) losses[row] = weights[row] = lses[row] = T(0);
      continue;
    }
    if (target < 0 || target >= p.classes) {
      stop_kernel(p.failure, FailedCheck::CrossEntropy, target, p.classes);
    }
    const S* x = in + row * p.classes;
    OnlineSum<T> sum;
    T along = T(0);  // what label smoothing needs: the weighted sum of the logits
    if (p.smoothing == T(0)) {
      for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
        T value[width];
        load_piece<S, T, width>(x + i, value);
        sum.add(value);
      });
    } else {
      for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
        T value[width];
        load_piece<S, T, width>(x + i, value);
        sum.add(value);
#pragma unroll
        for (int k = 0; k < width; ++k) along += p.weight ? value[k] * p.weight[i + k] : value[k];
      });
    }
    sum.reduce(shared);
    const T lse = sum.top + log_of(sum.total);
    const T weight = p.weight ? p.weight[target] : T(1);
    T all_weights = T(0);
    if (p.smoothing != T(0)) {
      along = row_reduce(along, Plus(), shared);
      all_weights = weight_sum(p, shared);
    }
    const T loss = row_loss(p, weight, all_weights, lse, convert<T>(x[target]), along);
    if (threadIdx.x == 0) {
      losses[row] = loss;
      weights[row] = weight;
      lses[row] = lse;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    total_loss(char* loss, DType dtype, T* total_weight, const T* losses, const T* weights,
               int64_t rows, int64_t reduction) {
  __shared__ T shared[kSumThreads / kWarp];
  T sum = T(0), total = T(0);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) {
    sum += losses[i];
    total += weights[i];
  }
  sum = row_reduce(sum, Plus(), shared);
  total = row_reduce(total, Plus(), shared);
  if (threadIdx.x != 0) return;
  *total_weight = total;
  if (reduction != kNone) store_as(loss, dtype, reduction == kMean ? sum / total : sum);
}

template <class S, class T>
__global__ void store_losses(S* out, const T* losses, int64_t rows) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < rows) out[i] = convert<S>(losses[i]);
}

static_assert(static_cast<int>(FailedCheck::CrossEntropy) == 10 && sizeof(FailureRecord) == 24,
              "cute_kernels/failure.py writes the record");

/// The rows' losses, weights and log-sum-exps through a CuTe kernel; false where none is chosen.
bool forward_by_cute(const Launch& launch, void* losses, void* weights, const Tensor& lse,
                     const Tensor& x, const Tensor& index, int64_t ignore_index,
                     double smoothing) {
  if (x.numel() == 0 || !cute::considered<cute::CrossEntropyForward>()) return false;
  cute::CrossEntropyForward a;
  a.m = x.sizes()[0];
  a.n = x.sizes()[1];
  a.words = 3;
  a.logits = {x.data(), x.dtype(), a.n};
  a.targets = {index.data(), DType::Int64};
  a.losses = {losses, DType::Float32};
  a.weights = {weights, DType::Float32};
  a.lse = {lse.data(), lse.dtype()};
  a.record = {failure_record(launch.device()), DType::Int64};
  a.ignore_index = ignore_index;
  a.smoothing = static_cast<float>(smoothing);
  return cute::launch(a, launch);
}

bool backward_by_cute(const Launch& launch, const Tensor& grad_input, const Tensor& grad,
                      const Tensor& x, const Tensor& index, const Tensor& lse,
                      const Tensor& total_weight, int64_t ignore_index, double smoothing) {
  if (x.dtype() == DType::Float64 || !cute::considered<cute::CrossEntropyBackward>()) return false;
  const Tensor g = dense_as(grad, DType::Float32), lses = dense_as(lse, DType::Float32),
               total = dense_as(total_weight, DType::Float32);
  cute::CrossEntropyBackward a;
  a.m = x.sizes()[0];
  a.n = x.sizes()[1];
  a.grads = g.numel();
  a.one = 1;
  a.logits = {x.data(), x.dtype(), a.n};
  a.targets = {index.data(), DType::Int64};
  a.lse = {lses.data(), DType::Float32};
  a.grad = {g.data(), DType::Float32};
  if (total.defined()) a.total_weight = {total.data(), DType::Float32};
  a.dx = {grad_input.data(), x.dtype(), a.n};
  a.ignore_index = ignore_index;
  a.smoothing = static_cast<float>(smoothing);
  return cute::launch(a, launch);
}

void forward(const Tensor& loss, const Tensor& lse, const Tensor& total_weight, const Tensor& self,
             const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
             double smoothing) {
  const Launch launch(self.device());
  const Tensor x = dense(self), index = dense_as(target, DType::Int64);
  visit_float_storage(self.dtype(), [&]<class S>() {
    using T = Compute<S>;
    const Tensor w = dense_as(weight, DTypeOf<T>::value);
    const auto p = problem<T>(self, index, w, ignore_index, smoothing);
    const Scratch each(static_cast<size_t>(2 * p.rows + 1) * sizeof(T), launch);
    T* losses = each.data<T>();
    T* weights = losses + p.rows;
    const bool done = !weight.defined() && forward_by_cute(launch, losses, weights, lse, x, index,
                                                           ignore_index, smoothing);
    const S* in = x.data_as<S>();
    if (p.rows > 0 && !done && !tiled_losses(launch, losses, weights, lse.data_as<T>(), in, p)) {
      const LogitLaunch shape(p.rows, p.classes);
      launch(is_aligned(in) || sizeof(S) == 8 ? row_losses<S, kWidthOf<S>> : row_losses<S, 1>,
             shape.grid, shape.block, 0, losses, weights, lse.data_as<T>(), in, p);
    }
    launch(total_loss<T>, dim3(1), dim3(kSumThreads), 0, static_cast<char*>(loss.data()),
           loss.dtype(), total_weight.data_as<T>(), losses, weights, p.rows, reduction);
    if (reduction == kNone && p.rows > 0) {
      launch(store_losses<S, T>, dim3(static_cast<unsigned>(ceil_div<int64_t>(p.rows, 256))),
             dim3(256), 0, loss.data_as<S>(), losses, p.rows);
    }
  });
}

template <class S, int W>
__global__ void __launch_bounds__(kRowThreads)
    logit_gradients(S* out, const S* in, const Compute<S>* grad, const Compute<S>* lses,
                    const Compute<S>* total_weight, bool grad_per_row, Problem<Compute<S>> p) {
  using T = Compute<S>;
  __shared__ T shared[kRowThreads / kWarp];
  // `total_weight` is null unless the loss is a mean.
  const T divisor = total_weight ? *total_weight : T(1);
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    const int64_t target = p.targets[row];
    const S* x = in + row * p.classes;
    S* dx = out + row * p.classes;
    if (target == p.ignored) {
      for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
        T zeros[width];
#pragma unroll
        for (int k = 0; k < width; ++k) zeros[k] = T(0);
        store_piece<S, T, width>(dx + i, zeros);
      });
      continue;
    }
    const T scale = grad[grad_per_row ? row : 0] / divisor, lse = lses[row];
    const T all_weights = p.smoothing != T(0) ? weight_sum(p, shared) : T(0);
    const RowGradient<T> g(p, p.weight ? p.weight[target] : T(1), all_weights, scale);
    for_each_piece<W>(x, p.classes, [&](auto width, int64_t i) {
      T value[width];
      load_piece<S, T, width>(x + i, value);
#pragma unroll
      for (int k = 0; k < width; ++k) value[k] = g.of(p, value[k], lse, i + k, target);
      store_piece<S, T, width>(dx + i, value);
    });
  }
}

void backward(const Tensor& grad_input, const Tensor& grad, const Tensor& self,
              const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
              double smoothing, const Tensor& lse, const Tensor& total_weight) {
  if (self.numel() == 0) return;
  const Launch launch(self.device());
  const Tensor x = dense(self), index = dense_as(target, DType::Int64);
  if (!weight.defined() &&
      backward_by_cute(launch, grad_input, grad, x, index, lse,
                       reduction == kMean ? total_weight : Tensor(), ignore_index, smoothing))
    return;
  visit_float_storage(self.dtype(), [&]<class S>() {
    using T = Compute<S>;
    constexpr DType kCompute = DTypeOf<T>::value;
    const Tensor w = dense_as(weight, kCompute), g = dense_as(grad, kCompute),
                 lses = dense_as(lse, kCompute), total = dense_as(total_weight, kCompute);
    const auto p = problem<T>(self, index, w, ignore_index, smoothing);
    const LogitLaunch shape(p.rows, p.classes);
    S* out = grad_input.data_as<S>();
    const S* in = x.data_as<S>();
    const bool together = is_aligned(in) && is_aligned(out);
    launch(together || sizeof(S) == 8 ? logit_gradients<S, kWidthOf<S>> : logit_gradients<S, 1>,
           shape.grid, shape.block, 0, out, in, g.data_as<T>(), lses.data_as<T>(),
           reduction == kMean ? total.data_as<T>() : nullptr, reduction == kNone, p);
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t._cross_entropy_index = forward;
  t._cross_entropy_index_backward = backward;
});

}  // namespace
}  // namespace vt::cuda
