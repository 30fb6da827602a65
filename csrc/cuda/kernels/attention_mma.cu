// Attention of 16-bit floats on tensor cores: the same sums as attention.cu and
// attention_backward.cu, for heads up to 128 wide whose rows are 16-byte aligned. Probabilities and
// their gradients are rounded to the operands' dtype before the second product, as sums are in float.
#include "cuda/kernels/attention_mma.cuh"

namespace vt::cuda {
namespace attention {
namespace {

/// The largest (or the sum) over the 4 lanes that share a row.
template <class Op>
__device__ inline float across_quad(float value, const Op& op) {
  value = op(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return op(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

/// Whether scores of queries [q, q + qn) and keys [k, k + kn) need no mask of any kind.
template <class S>
__device__ inline bool all_visible(const Problem<S>& p, int64_t q, int qn, int64_t k, int kn) {
  return !p.mask.data && q + qn <= p.queries && k + kn <= p.keys && (!p.causal || k + kn - 1 <= q);
}

template <class S, int D>
__global__ void __launch_bounds__(kMmaThreads)
    forward_kernel(const __grid_constant__ Problem<S> p, Operand<S> out, float* lse,
                   int64_t* rng_state, int tiles) {
  extern __shared__ __align__(16) char memory[];
  const MmaTile<S, D> query{reinterpret_cast<S*>(memory)},
      key{reinterpret_cast<S*>(memory + MmaTile<S, D>::kBytes)},
      value{reinterpret_cast<S*>(memory + 2 * MmaTile<S, D>::kBytes)};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (rng_state && blockIdx.x == 0 && threadIdx.x == 0) {
    const PhiloxArgs rng = counters_of(p.rng);
    rng_state[0] = static_cast<int64_t>(rng.seed);
    rng_state[1] = static_cast<int64_t>(rng.offset);
  }
  // The last queries see the most keys: they go first.
  const int64_t q0 = (tiles - 1 - static_cast<int64_t>(blockIdx.x % tiles)) * kTile;
  const int64_t pair = blockIdx.x / tiles, b = pair / p.heads, h = pair % p.heads;
  const int64_t kv = p.key_head(h), mine = q0 + warp * 16;
  const int64_t limit = p.causal && q0 + kTile < p.keys ? q0 + kTile : p.keys;
  query.load(p.query, b, h, q0, p.queries, p.width);
  float sum[D / 8][4], top[2] = {minus_infinity<float>(), minus_infinity<float>()},
                       total[2] = {0.f, 0.f};
  clear_fragments(sum);
  for (int64_t k0 = 0; k0 < limit; k0 += kTile) {
    __syncthreads();  // the last tile has been used
    key.load(p.key, b, kv, k0, p.keys, p.width);
    value.load(p.value, b, kv, k0, p.keys, p.value_width);
    __syncthreads();
    float score[kFragments][4];
    dot_tile(score, query, warp * 16, key);
    const bool visible = all_visible(p, mine, 16, k0, kTile);
    float next[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t q = mine + lane / 4 + i / 2 * 8, k = k0 + n * 8 + lane % 4 * 2 + i % 2;
        score[n][i] =
            visible ? score[n][i] * p.scale : masked_score(p, score[n][i], b, h, q, k);
        next[i / 2] = fmaxf(next[i / 2], score[n][i]);
      }
    }
    float shift[2], row[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      next[r] = across_quad(next[r], Larger());
      shift[r] = OnlineSum<float>::shift(next[r]);
      const float correction = __expf(top[r] - shift[r]);
      total[r] *= correction;
      top[r] = next[r];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sum[n][2 * r] *= correction;
        sum[n][2 * r + 1] *= correction;
      }
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = __expf(score[n][i] - shift[i / 2]);
        row[i / 2] += score[n][i];
        if (p.dropout > 0) {
          const int64_t q = mine + lane / 4 + i / 2 * 8, k = k0 + n * 8 + lane % 4 * 2 + i % 2;
          score[n][i] *= dropout_factor(p, counters_of(p.rng), b, h, q, k);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] += across_quad(row[r], Plus());
    add_tile(sum, score, value);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t q = mine + lane / 4 + 8 * r;
    // A query that sees no key gets zeros.
    const float inverse = total[r] > 0.f || total[r] != total[r] ? 1.f / total[r] : 0.f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      sum[n][2 * r] *= inverse;
      sum[n][2 * r + 1] *= inverse;
    }
    if (lane % 4 == 0 && q < p.queries) lse[pair * p.queries + q] = top[r] + logf(total[r]);
  }
  store_fragments<S, D>(out, b, h, mine, p.queries, p.value_width, sum);
}

template <class S>
struct MmaSaved {
  Operand<S> grad;
  const float* lse;
  const float* along;
};

/// One element: from a dot product q·k and one g·v to the probability times dropout's factor, and
/// the gradient of q·k.
template <class S>
__device__ inline void element_gradient(const Problem<S>& p, const PhiloxArgs& rng, bool visible,
                                        float& prob, float& dprob, float lse, float along,
                                        int64_t b, int64_t h, int64_t q, int64_t k) {
  const float score = visible ? prob * p.scale : masked_score(p, prob, b, h, q, k);
  // A masked score gives exactly 0, and so does a query that sees no key.
  const bool never = score == minus_infinity<float>() || lse == minus_infinity<float>();
  const float value = never ? 0.f : __expf(score - lse);
  const float factor = p.dropout > 0 ? dropout_factor(p, rng, b, h, q, k) : 1.f;
  dprob = never ? 0.f : value * (dprob * factor - along) * p.scale;
  prob = value * factor;
}

template <class S>
__device__ inline PhiloxArgs read_rng(const Problem<S>& p) {
  if (!(p.dropout > 0)) return {};
  return {static_cast<uint64_t>(p.rng_state[0]), static_cast<uint64_t>(p.rng_state[1])};
}

template <class S, int D>
__global__ void __launch_bounds__(kMmaThreads)
    query_gradient_kernel(const __grid_constant__ Problem<S> p,
                          const __grid_constant__ MmaSaved<S> saved, Operand<S> out, int tiles) {
  extern __shared__ __align__(16) char memory[];
  constexpr int kBytes = MmaTile<S, D>::kBytes;
  const MmaTile<S, D> query{reinterpret_cast<S*>(memory)},
      grad{reinterpret_cast<S*>(memory + kBytes)}, key{reinterpret_cast<S*>(memory + 2 * kBytes)},
      value{reinterpret_cast<S*>(memory + 3 * kBytes)};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const PhiloxArgs rng = read_rng(p);
  const int64_t q0 = (tiles - 1 - static_cast<int64_t>(blockIdx.x % tiles)) * kTile;
  const int64_t pair = blockIdx.x / tiles, b = pair / p.heads, h = pair % p.heads;
  const int64_t kv = p.key_head(h), mine = q0 + warp * 16;
  const int64_t limit = p.causal && q0 + kTile < p.keys ? q0 + kTile : p.keys;
  query.load(p.query, b, h, q0, p.queries, p.width);
  grad.load(saved.grad, b, h, q0, p.queries, p.value_width);
  float lse[2], along[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t q = mine + lane / 4 + 8 * r;
    lse[r] = q < p.queries ? saved.lse[pair * p.queries + q] : 0.f;
    along[r] = q < p.queries ? saved.along[pair * p.queries + q] : 0.f;
  }
  float sum[D / 8][4];
  clear_fragments(sum);
  for (int64_t k0 = 0; k0 < limit; k0 += kTile) {
    __syncthreads();  // the last tile has been used
    key.load(p.key, b, kv, k0, p.keys, p.width);
    value.load(p.value, b, kv, k0, p.keys, p.value_width);
    __syncthreads();
    float prob[kFragments][4], dprob[kFragments][4];
    dot_tile(prob, query, warp * 16, key);
    dot_tile(dprob, grad, warp * 16, value);
    const bool visible = all_visible(p, mine, 16, k0, kTile);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        element_gradient(p, rng, visible, prob[n][i], dprob[n][i], lse[i / 2], along[i / 2], b, h,
                         mine + lane / 4 + i / 2 * 8, k0 + n * 8 + lane % 4 * 2 + i % 2);
      }
    }
    add_tile(sum, dprob, key);
  }
  store_fragments<S, D>(out, b, h, mine, p.queries, p.width, sum);
}

/// Scores are computed transposed, keys by queries: so they are the left operand of both products.
template <class S, int D>
__global__ void __launch_bounds__(kMmaThreads)
    key_value_gradients_kernel(const __grid_constant__ Problem<S> p,
                               const __grid_constant__ MmaSaved<S> saved, Operand<S> key_out,
                               Operand<S> value_out, int tiles) {
  extern __shared__ __align__(16) char memory[];
  constexpr int kBytes = MmaTile<S, D>::kBytes;
  const MmaTile<S, D> query{reinterpret_cast<S*>(memory)},
      grad{reinterpret_cast<S*>(memory + kBytes)}, key{reinterpret_cast<S*>(memory + 2 * kBytes)},
      value{reinterpret_cast<S*>(memory + 3 * kBytes)};
  __shared__ float lse[kTile], along[kTile];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const PhiloxArgs rng = read_rng(p);
  const int64_t k0 = static_cast<int64_t>(blockIdx.x % tiles) * kTile, mine = k0 + warp * 16;
  const int64_t pair = blockIdx.x / tiles, b = pair / p.key_heads, kv = pair % p.key_heads;
  const int64_t sharing = p.heads / p.key_heads;
  key.load(p.key, b, kv, k0, p.keys, p.width);
  value.load(p.value, b, kv, k0, p.keys, p.value_width);
  float dk[D / 8][4], dv[D / 8][4];
  clear_fragments(dk);
  clear_fragments(dv);
  for (int64_t h = kv * sharing; h < (kv + 1) * sharing; ++h) {
    // Queries before the tile's first key do not see it.
    for (int64_t q0 = p.causal ? k0 : 0; q0 < p.queries; q0 += kTile) {
      __syncthreads();  // the last tile has been used
      query.load(p.query, b, h, q0, p.queries, p.width);
      grad.load(saved.grad, b, h, q0, p.queries, p.value_width);
      if (threadIdx.x < kTile) {
        const int64_t q = q0 + threadIdx.x, at = (b * p.heads + h) * p.queries + q;
        lse[threadIdx.x] = q < p.queries ? saved.lse[at] : 0.f;
        along[threadIdx.x] = q < p.queries ? saved.along[at] : 0.f;
      }
      __syncthreads();
      float prob[kFragments][4], dprob[kFragments][4];
      dot_tile(prob, key, warp * 16, query);
      dot_tile(dprob, value, warp * 16, grad);
      const bool visible = all_visible(p, q0, kTile, mine, 16);
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + lane % 4 * 2 + i % 2;
          element_gradient(p, rng, visible, prob[n][i], dprob[n][i], lse[column], along[column], b,
                           h, q0 + column, mine + lane / 4 + i / 2 * 8);
        }
      }
      add_tile(dv, prob, grad);
      add_tile(dk, dprob, query);
    }
  }
  store_fragments<S, D>(key_out, b, kv, mine, p.keys, p.width, dk);
  store_fragments<S, D>(value_out, b, kv, mine, p.keys, p.value_width, dv);
}

/// Calls f.template operator()<S, D>() where tensor cores apply, else returns false.
template <class F>
bool visit_mma(DType dtype, int64_t width, int64_t value_width, F&& f) {
  if (!mma_width(width) || !mma_width(value_width)) return false;
  const bool narrow = std::max(width, value_width) <= 64;
  if (dtype == DType::BFloat16)
    return narrow ? f.template operator()<__nv_bfloat16, 64>()
                  : f.template operator()<__nv_bfloat16, 128>();
  if (dtype == DType::Float16)
    return narrow ? f.template operator()<__half, 64>() : f.template operator()<__half, 128>();
  return false;
}

}  // namespace

bool mma_forward(const Launch& launch, const Tensor& out, const Tensor& lse,
                 const Tensor& rng_state, const Tensor& query, const Tensor& key,
                 const Tensor& value, const Tensor& mask, double dropout_p, bool is_causal,
                 double scale, const PhiloxArgs& rng) {
  return visit_mma(
      query.dtype(), query.sizes()[3], value.sizes()[3], [&]<class S, int D>() {
        Problem<S> p(query, key, value, mask, dropout_p, is_causal, scale);
        p.rng = rng;
        const Operand<S> target(out);
        if (!in_pieces(p.query) || !in_pieces(p.key) || !in_pieces(p.value) || !in_pieces(target))
          return false;
        const int64_t tiles = ceil_div<int64_t>(p.queries, kTile);
        constexpr int kBytes = 3 * MmaTile<S, D>::kBytes;
        allow_shared_memory(forward_kernel<S, D>, kBytes);
        launch(forward_kernel<S, D>, tile_grid(p.batch * p.heads, tiles, 1), dim3(kMmaThreads),
               kBytes, p, target, lse.data_as<float>(), rng_state.data_as<int64_t>(),
               static_cast<int>(tiles));
        return true;
      });
}

bool mma_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                  const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                  const Tensor& key, const Tensor& value, const Tensor& mask, const float* lse,
                  const float* along, const Tensor& rng_state, double dropout_p, bool is_causal,
                  double scale) {
  return visit_mma(
      query.dtype(), query.sizes()[3], value.sizes()[3], [&]<class S, int D>() {
        Problem<S> p(query, key, value, mask, dropout_p, is_causal, scale);
        p.rng_state = rng_state.data_as<int64_t>();
        const Operand<S> dq(grad_query), dk(grad_key), dv(grad_value);
        const MmaSaved<S> saved{Operand<S>(grad), lse, along};
        const Operand<S> operands[] = {p.query, p.key, p.value, saved.grad, dq, dk, dv};
        for (const Operand<S>& t : operands) {
          if (!in_pieces(t)) return false;
        }
        constexpr int kBytes = 4 * MmaTile<S, D>::kBytes;
        const int64_t query_tiles = ceil_div<int64_t>(p.queries, kTile);
        allow_shared_memory(query_gradient_kernel<S, D>, kBytes);
        launch(query_gradient_kernel<S, D>, tile_grid(p.batch * p.heads, query_tiles, 1),
               dim3(kMmaThreads), kBytes, p, saved, dq, static_cast<int>(query_tiles));
        const int64_t key_tiles = ceil_div<int64_t>(p.keys, kTile);
        allow_shared_memory(key_value_gradients_kernel<S, D>, kBytes);
        launch(key_value_gradients_kernel<S, D>, tile_grid(p.batch * p.key_heads, key_tiles, 1),
               dim3(kMmaThreads), kBytes, p, saved, dk, dv, static_cast<int>(key_tiles));
        return true;
      });
}

}  // namespace attention
}  // namespace vt::cuda
