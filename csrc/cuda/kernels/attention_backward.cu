// Scaled dot-product attention, backward: probabilities are computed again from the saved
// log-sum-exp. One kernel owns tiles of queries (their gradient), another tiles of keys (the
// gradients of key and value, over all query heads that share them), so every sum has one owner and
// a fixed order.
#include "cuda/kernels/attention_cudnn.h"
#include "cuda/kernels/attention_float.h"
#include "cuda/kernels/attention_head.h"
#include "cuda/kernels/attention_long.h"
#include "cuda/kernels/attention_mma.cuh"
#include "cuda/kernels/attention_short.h"
#include "cuda/kernels/attention_tiles.h"
#include "cuda/kernels/copy.cuh"
#include "dispatch/head_sums.h"

namespace vt::cuda {
namespace {
using namespace attention;

/// along = Σ grad · output of every query, a warp each.
template <class S>
__global__ void __launch_bounds__(kThreads)
    gradient_along_output(Compute<S>* along, Operand<S> grad, Operand<S> output, int64_t heads,
                          int64_t queries, int64_t rows, int64_t width) {
  using T = Compute<S>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (i >= rows) return;
  const int64_t q = i % queries, pair = i / queries, b = pair / heads, h = pair % heads;
  const S* g = grad.at(b, h) + q * grad.row;
  const S* o = output.at(b, h) + q * output.row;
  T sum = T(0);
  for (int64_t c = threadIdx.x; c < width; c += kWarp)
    sum += convert<T>(g[c * grad.column]) * convert<T>(o[c * output.column]);
  sum = row_reduce<T>(sum, Plus(), nullptr);
  if (threadIdx.x == 0) along[i] = sum;
}

template <class S>
struct Saved {
  Operand<S> grad;
  const Compute<S>* lse;
  const Compute<S>* along;
};

/// From a tile of dot products q·k and g·v to probabilities times dropout's factors (in `prob`) and
/// gradients of q·k (in `dprob`).
template <class S, class T>
__device__ inline void score_gradients(const Problem<S>& p, const Saved<S>& saved, PhiloxArgs rng,
                                       T (&prob)[4][4], T (&dprob)[4][4], int64_t b, int64_t h,
                                       int64_t q0, int64_t k0) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t q = q0 + ty * 4 + i, at = (b * p.heads + h) * p.queries + q;
    const T shift = q < p.queries ? saved.lse[at] : T(0);
    const T along = q < p.queries ? saved.along[at] : T(0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = k0 + tx + 16 * j;
      const T score = masked_score(p, prob[i][j], b, h, q, k);
      // A masked score gives exactly 0, and so does a query that sees no key.
      const bool never = score == minus_infinity<T>() || shift == minus_infinity<T>();
      const T value = never ? T(0) : exp_of(score - shift);
      const T factor = p.dropout > 0 ? dropout_factor(p, rng, b, h, q, k) : T(1);
      dprob[i][j] = never ? T(0) : value * (dprob[i][j] * factor - along) * p.scale;
      prob[i][j] = value * factor;
    }
  }
}

template <class T, int D>
__device__ inline void put_scores(const Shared<T, D>& shared, const T (&tile)[4][4]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      shared.scores[(ty * 4 + i) * kScoreRow + tx + 16 * j] = tile[i][j];
  }
}

template <class S>
__device__ inline PhiloxArgs saved_rng(const Problem<S>& p) {
  if (!(p.dropout > 0)) return {};
  return {static_cast<uint64_t>(p.rng_state[0]), static_cast<uint64_t>(p.rng_state[1])};
}

template <class S, int D>
__global__ void __launch_bounds__(kThreads)
    query_gradient(const __grid_constant__ Problem<S> p, const __grid_constant__ Saved<S> saved,
                   Operand<S> out, int tiles, int parts) {
  using T = Compute<S>;
  extern __shared__ __align__(16) char memory[];
  const Shared<T, D> shared(memory);
  const PhiloxArgs rng = saved_rng(p);
  const int64_t column = static_cast<int64_t>(blockIdx.x % parts) * D;
  const int64_t q0 = (tiles - 1 - static_cast<int64_t>(blockIdx.x / parts % tiles)) * kTile;
  const int64_t pair = blockIdx.x / parts / tiles, b = pair / p.heads, h = pair % p.heads;
  const int64_t kv = p.key_head(h);
  const Strip<S> query(p.query, b, h, q0, p.queries, p.width);
  const Strip<S> grad(saved.grad, b, h, q0, p.queries, p.value_width);
  const int64_t limit = p.causal && q0 + kTile < p.keys ? q0 + kTile : p.keys;
  T sum[4][D / 16];
  clear(sum);
  for (int64_t k0 = 0; k0 < limit; k0 += kTile) {
    const Strip<S> key(p.key, b, kv, k0, p.keys, p.width);
    T prob[4][4], dprob[4][4];
    dot_rows(prob, query, key, shared);
    dot_rows(dprob, grad, Strip<S>(p.value, b, kv, k0, p.keys, p.value_width), shared);
    score_gradients(p, saved, rng, prob, dprob, b, h, q0, k0);
    put_scores(shared, dprob);
    add_product<false>(sum, key, column, shared);
  }
  store_tile(out, b, h, q0, p.queries, column, p.width, sum);
}

template <class S, int D>
__global__ void __launch_bounds__(kThreads)
    key_value_gradients(const __grid_constant__ Problem<S> p,
                        const __grid_constant__ Saved<S> saved, Operand<S> key_out,
                        Operand<S> value_out, int tiles, int parts) {
  using T = Compute<S>;
  extern __shared__ __align__(16) char memory[];
  const Shared<T, D> shared(memory);
  const PhiloxArgs rng = saved_rng(p);
  const int64_t column = static_cast<int64_t>(blockIdx.x % parts) * D;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x / parts % tiles) * kTile;
  const int64_t pair = blockIdx.x / parts / tiles, b = pair / p.key_heads, kv = pair % p.key_heads;
  const int64_t sharing = p.heads / p.key_heads;
  const Strip<S> key(p.key, b, kv, k0, p.keys, p.width);
  const Strip<S> value(p.value, b, kv, k0, p.keys, p.value_width);
  T dk[4][D / 16], dv[4][D / 16];
  clear(dk);
  clear(dv);
  for (int64_t h = kv * sharing; h < (kv + 1) * sharing; ++h) {
    // Queries before the tile's first key do not see it.
    for (int64_t q0 = p.causal ? k0 : 0; q0 < p.queries; q0 += kTile) {
      const Strip<S> query(p.query, b, h, q0, p.queries, p.width);
      const Strip<S> grad(saved.grad, b, h, q0, p.queries, p.value_width);
      T prob[4][4], dprob[4][4];
      dot_rows(prob, query, key, shared);
      dot_rows(dprob, grad, value, shared);
      score_gradients(p, saved, rng, prob, dprob, b, h, q0, k0);
      put_scores(shared, prob);
      add_product<true>(dv, grad, column, shared);
      put_scores(shared, dprob);
      add_product<true>(dk, query, column, shared);
    }
  }
  store_tile(key_out, b, kv, k0, p.keys, column, p.width, dk);
  store_tile(value_out, b, kv, k0, p.keys, column, p.value_width, dv);
}

/// Fills a gradient, whose elements may lie among those of others, with zeros.
void zero(const Launch& launch, const Tensor& t) {
  if (t.numel() == 0) return;
  if (!t.is_non_overlapping_and_dense()) {
    const Tensor zeros = empty(t.sizes(), t.dtype(), t.device());
    zero(launch, zeros);
    copy(t, zeros, true);
    return;
  }
  check_cuda(cudaMemsetAsync(t.data(), 0, static_cast<size_t>(t.numel() * t.itemsize()),
                             launch.stream()),
             "filling a gradient with zeros");
}

/// Whether `sums` are made as well; only some kernels do that.
bool gradients(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
               const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
               const Tensor& mask, const Tensor& output, const Tensor& lse,
               const Tensor& rng_state, double dropout_p, bool is_causal, double scale,
               const GradientSums& sums) {
  const Launch launch(query.device());
  const int64_t width = query.sizes()[3], value_width = value.sizes()[3];
  // Without columns of queries and keys all keys weigh the same, and only values have a gradient.
  if (lse.numel() == 0 || key.sizes()[2] == 0 || value_width == 0) {
    for (const Tensor* t : {&grad_query, &grad_key, &grad_value}) zero(launch, *t);
    return false;
  }
  const Tensor g = grad.dtype() == query.dtype() ? grad : dense_as(grad, query.dtype());
  const Tensor o = output.dtype() == query.dtype() ? output : dense_as(output, query.dtype());
  if (width > 0 && !mask.defined() && dropout_p == 0) {
    if (head_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, o, lse,
                      is_causal, scale, sums) ||
        long_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, o, lse,
                      is_causal, scale, sums) ||
        tile_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, o, lse,
                      is_causal, scale, sums))
      return sums.wanted();
    if (short_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, o, lse,
                       is_causal, scale) ||
        cudnn_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, o, lse,
                       is_causal, scale))
      return false;
  }
  if (float_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, mask, o, lse,
                     rng_state, dropout_p, is_causal, scale))
    return false;
  visit_widths(query.dtype(), std::max(width, value_width), [&]<class S, int D>() {
    using T = Compute<S>;
    Problem<S> p(query, key, value, mask, dropout_p, is_causal, scale);
    p.rng_state = rng_state.data_as<int64_t>();
    const Tensor lses = dense_as(lse, DTypeOf<T>::value);
    const int64_t rows = lses.numel();
    const Scratch along(static_cast<size_t>(rows) * sizeof(T), launch);
    const Saved<S> saved{Operand<S>(g), lses.data_as<T>(), along.data<T>()};
    constexpr int kRows = kThreads / kWarp;
    launch(gradient_along_output<S>, tile_grid(ceil_div<int64_t>(rows, kRows), 1, 1),
           dim3(kWarp, kRows), 0, along.data<T>(), saved.grad, Operand<S>(o), p.heads, p.queries,
           rows, value_width);
    if constexpr (sizeof(S) == 2) {
      if (width > 0 &&
          mma_backward(launch, grad_query, grad_key, grad_value, g, query, key, value, mask,
                       saved.lse, saved.along, rng_state, dropout_p, is_causal, scale))
        return;
    }
    constexpr int kBytes = Shared<T, D>::kBytes;
    const int64_t query_tiles = ceil_div<int64_t>(p.queries, kTile);
    const int64_t query_parts = ceil_div<int64_t>(width, D);
    if (width > 0) {
      allow_shared_memory(query_gradient<S, D>, kBytes);
      launch(query_gradient<S, D>, tile_grid(p.batch * p.heads, query_tiles, query_parts),
             dim3(kThreads), kBytes, p, saved, Operand<S>(grad_query),
             static_cast<int>(query_tiles), static_cast<int>(query_parts));
    }
    const int64_t key_tiles = ceil_div<int64_t>(p.keys, kTile);
    const int64_t key_parts = ceil_div<int64_t>(std::max(width, value_width), D);
    allow_shared_memory(key_value_gradients<S, D>, kBytes);
    launch(key_value_gradients<S, D>, tile_grid(p.batch * p.key_heads, key_tiles, key_parts),
           dim3(kThreads), kBytes, p, saved, Operand<S>(grad_key), Operand<S>(grad_value),
           static_cast<int>(key_tiles), static_cast<int>(key_parts));
  });
  return false;
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
              const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& mask, const Tensor& output, const Tensor& lse, const Tensor& rng_state,
              double dropout_p, bool is_causal, double scale) {
  gradients(grad_query, grad_key, grad_value, grad, query, key, value, mask, output, lse, rng_state,
            dropout_p, is_causal, scale, {});
}

void backward_sums(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                   const Tensor& query_sums, const Tensor& key_sums, const Tensor& value_sums,
                   const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& mask, const Tensor& output, const Tensor& lse,
                   const Tensor& rng_state, double dropout_p, bool is_causal, double scale, bool,
                   bool, bool, std::optional<DType> dtype) {
  // The kernels add up in float what they have written; sum may be asked for more, or for rounding
  // first.
  GradientSums wanted;
  if (!dtype || *dtype == query.dtype() || *dtype == DType::Float32)
    wanted = {query_sums, key_sums, value_sums};
  if (gradients(grad_query, grad_key, grad_value, grad, query, key, value, mask, output, lse,
                rng_state, dropout_p, is_causal, scale, wanted))
    return;
  const HeadSums sums[] = {
      {grad_query, query_sums}, {grad_key, key_sums}, {grad_value, value_sums}};
  sum_head_rows(kernels_for(DeviceType::CUDA), sums, dtype);
}

const RegisterCuda registered([](KernelTable& t) {
  t._attention_backward = backward;
  t._attention_backward_sums = backward_sums;
});

}  // namespace
}  // namespace vt::cuda
