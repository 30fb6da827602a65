// Scaled dot-product attention, forward: a block owns 64 queries of one head and walks over tiles
// of 64 keys with a running softmax, so no L x S matrix is kept; one log-sum-exp a query is saved
// for backward. Arithmetic is in float (double for doubles) for every dtype, stride and mask; 16-bit
// heads that are laid out for it go to tensor cores (attention_mma.cu).
// Source: Dao et al., "FlashAttention", NeurIPS 2022, and its second part.
#include "cuda/kernels/attention_cudnn.h"
#include "cuda/kernels/attention_float.h"
#include "cuda/kernels/attention_head.h"
#include "cuda/kernels/attention_long.h"
#include "cuda/kernels/attention_mma.cuh"
#include "cuda/kernels/attention_short.h"

namespace vt::cuda {
namespace {
using namespace attention;

__global__ void store_rng_state(int64_t* state, PhiloxArgs args) {
  const PhiloxArgs rng = counters_of(args);
  state[0] = static_cast<int64_t>(rng.seed);
  state[1] = static_cast<int64_t>(rng.offset);
}

/// The largest (or the sum) over the 16 threads that share a row.
template <class T, class Op>
__device__ inline T across_row(T value, const Op& op) {
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

template <class S, int D>
__global__ void __launch_bounds__(kThreads)
    attention_forward(const __grid_constant__ Problem<S> p, Operand<S> out, Compute<S>* lse,
                      int64_t* rng_state, int tiles, int parts) {
  using T = Compute<S>;
  extern __shared__ __align__(16) char memory[];
  const Shared<T, D> shared(memory);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  if (rng_state && blockIdx.x == 0 && threadIdx.x == 0) {
    const PhiloxArgs rng = counters_of(p.rng);
    rng_state[0] = static_cast<int64_t>(rng.seed);
    rng_state[1] = static_cast<int64_t>(rng.offset);
  }
  const int64_t column = static_cast<int64_t>(blockIdx.x % parts) * D;
  // The last queries see the most keys: they go first.
  const int64_t q0 = (tiles - 1 - static_cast<int64_t>(blockIdx.x / parts % tiles)) * kTile;
  const int64_t pair = blockIdx.x / parts / tiles, b = pair / p.heads, h = pair % p.heads;
  const int64_t kv = p.key_head(h);
  const Strip<S> query(p.query, b, h, q0, p.queries, p.width);
  const int64_t limit = p.causal && q0 + kTile < p.keys ? q0 + kTile : p.keys;
  T sum[4][D / 16], top[4], total[4];
  clear(sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    top[i] = minus_infinity<T>();
    total[i] = T(0);
  }
  for (int64_t k0 = 0; k0 < limit; k0 += kTile) {
    T tile[4][4];
    dot_rows(tile, query, Strip<S>(p.key, b, kv, k0, p.keys, p.width), shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t q = q0 + ty * 4 + i;
      T next = top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        tile[i][j] = masked_score(p, tile[i][j], b, h, q, k0 + tx + 16 * j);
        next = Larger()(next, tile[i][j]);
      }
      next = across_row(next, Larger());
      const T shift = OnlineSum<T>::shift(next), correction = exp_of(top[i] - shift);
      T row = T(0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        tile[i][j] = exp_of(tile[i][j] - shift);
        row += tile[i][j];
        if (p.dropout > 0) tile[i][j] *= dropout_factor(p, counters_of(p.rng), b, h, q, k0 + tx + 16 * j);
        shared.scores[(ty * 4 + i) * kScoreRow + tx + 16 * j] = tile[i][j];
      }
      total[i] = total[i] * correction + across_row(row, Plus());
      top[i] = next;
#pragma unroll
      for (int j = 0; j < D / 16; ++j) sum[i][j] *= correction;
    }
    add_product<false>(sum, Strip<S>(p.value, b, kv, k0, p.keys, p.value_width), column, shared);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t q = q0 + ty * 4 + i;
    // A query that sees no key gets zeros.
    const T inverse = total[i] > T(0) || total[i] != total[i] ? T(1) / total[i] : T(0);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) sum[i][j] *= inverse;
    if (column == 0 && tx == 0 && q < p.queries)
      lse[pair * p.queries + q] = top[i] + log_of(total[i]);
  }
  store_tile(out, b, h, q0, p.queries, column, p.value_width, sum);
}

void forward(const Tensor& out, const Tensor& lse, const Tensor& rng_state, const Tensor& query,
             const Tensor& key, const Tensor& value, const Tensor& mask, double dropout_p,
             bool is_causal, double scale, const PhiloxArgs& rng) {
  const Launch launch(query.device());
  if (lse.numel() == 0) {
    if (rng_state.numel() > 0)
      launch(store_rng_state, dim3(1), dim3(1), 0, rng_state.data_as<int64_t>(), rng);
    return;
  }
  if (!mask.defined() && dropout_p == 0 &&
      (head_forward(launch, out, lse, query, key, value, is_causal, scale) ||
       short_forward(launch, out, lse, query, key, value, is_causal, scale) ||
       long_forward(launch, out, lse, query, key, value, is_causal, scale) ||
       cudnn_forward(launch, out, lse, query, key, value, is_causal, scale)))
    return;
  if (mma_forward(launch, out, lse, rng_state, query, key, value, mask, dropout_p, is_causal, scale,
                  rng) ||
      float_forward(launch, out, lse, rng_state, query, key, value, mask, dropout_p, is_causal,
                    scale, rng))
    return;
  const int64_t value_width = value.sizes()[3];
  visit_widths(query.dtype(), value_width, [&]<class S, int D>() {
    Problem<S> p(query, key, value, mask, dropout_p, is_causal, scale);
    p.rng = rng;
    const int64_t tiles = ceil_div<int64_t>(p.queries, kTile);
    const int64_t parts = std::max<int64_t>(ceil_div<int64_t>(value_width, D), 1);
    constexpr int kBytes = Shared<Compute<S>, D>::kBytes;
    allow_shared_memory(attention_forward<S, D>, kBytes);
    launch(attention_forward<S, D>, tile_grid(p.batch * p.heads, tiles, parts), dim3(kThreads),
           kBytes, p, Operand<S>(out), lse.data_as<Compute<S>>(), rng_state.data_as<int64_t>(),
           static_cast<int>(tiles), static_cast<int>(parts));
  });
}

template <class S>
__global__ void store_dropout_factors(S* out, Problem<S> p, const int64_t* rng_state, int64_t n) {
  const PhiloxArgs rng{static_cast<uint64_t>(rng_state[0]), static_cast<uint64_t>(rng_state[1])};
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step)
    out[i] = convert<S>(dropout_factor(p, rng, 0, 0, 0, i));  // i counts as b, h, q, k do
}

void dropout_factors(const Tensor& out, const Tensor& rng_state, const Tensor& query,
                     const Tensor& key, double dropout_p) {
  const int64_t n = out.numel();
  if (n == 0) return;
  const Launch launch(out.device());
  visit_float_storage(out.dtype(), [&]<class S>() {
    const Problem<S> p(query, key, key, Tensor(), dropout_p, false, 1);
    launch(store_dropout_factors<S>,
           dim3(static_cast<unsigned>(launch.fill(ceil_div<int64_t>(n, 256), 256))), dim3(256), 0,
           out.data_as<S>(), p, rng_state.data_as<int64_t>(), n);
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t._attention = forward;
  t._attention_dropout_factors = dropout_factors;
});

}  // namespace
}  // namespace vt::cuda
