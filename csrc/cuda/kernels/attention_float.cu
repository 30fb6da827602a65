// Attention of float32 on tensor cores, forward (attention_float.cuh): a warp owns 16 queries and
// walks over the keys with a running softmax. Exponents are to the base 2.
#include "cuda/kernels/attention_float.h"

#include "cuda/kernels/attention_float.cuh"

namespace vt::cuda::attention {
namespace {

template <int N, bool kPlain>
__global__ void __launch_bounds__(kMostWarps* kWarp, N == 1 ? 2 : 1)
    float_forward_kernel(const __grid_constant__ Problem<float> p, Operand<float> out, float* lse,
                         int64_t* rng_state, int tiles) {
  constexpr int kRows = kStageRows<N>, kBytes = kOperandBytes<N>;
  extern __shared__ __align__(128) char memory[];
  const uint32_t stages = shared_place(memory);
  if (rng_state && blockIdx.x == 0 && threadIdx.x == 0) {
    const PhiloxArgs rng = counters_of(p.rng);
    rng_state[0] = static_cast<int64_t>(rng.seed);
    rng_state[1] = static_cast<int64_t>(rng.offset);
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRowsOfWarp;
  // The last queries see the most keys: they go first.
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * rows;
  const int64_t pair = blockIdx.x / tiles, b = pair / p.heads, h = pair % p.heads;
  const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
  const int mine = first + warp * kRowsOfWarp;
  const int limit = p.causal ? min(first + rows, keys) : keys;  // of the block
  const int own = mine >= queries ? 0
                  : p.causal      ? min(mine + kRowsOfWarp, keys)
                                  : keys;  // of the warp
  const float* const key = p.key.at(b, p.key_head(h));
  const float* const value = p.value.at(b, p.key_head(h));
  const auto start = [&](int k0) {
    const uint32_t to = stages + k0 / kRows % 2 * 2 * kBytes;
    const int count = min((limit - k0 + 15) / 16 * 16, kRows);
    start_panels<N>(to, kRows, key, p.key.row, k0, count, keys, static_cast<int>(p.width));
    start_panels<N>(to + kBytes, kRows, value, p.value.row, k0, count, keys,
                    static_cast<int>(p.value_width));
  };
  start(0);
  commit_stage();
  const LeftOperand<N, N != 4> query(p.query.at(b, h), p.query.row, mine, queries,
                                     static_cast<int>(p.width));
  const float factor = p.scale * kLog2OfE;
  float sum[N][4][4], top[2] = {minus_infinity<float>(), minus_infinity<float>()},
                      total[2] = {0.f, 0.f};
  clear_sums(sum);
  for (int k0 = 0; k0 < limit; k0 += kRows) {
    if (k0 + kRows < limit) start(k0 + kRows);
    commit_stage();
    wait_for_stage<1>();
    __syncthreads();
    const uint32_t stage = stages + k0 / kRows % 2 * 2 * kBytes;
    const int end = min(own - k0, kRows);
    for (int row = 0; row < end; row += 16) {
      float score[2][4];
      dot_sixteen(score, query, stage, row);
      const bool seen = all_seen(p, mine, k0 + row);
      const int q = mine + lane / 4, k = k0 + row + lane % 4 * 2;
      float next[2] = {top[0], top[1]}, correction[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n][i] = seen ? score[n][i] * factor
                             : checked_score<kPlain>(p, score[n][i], factor, b, h, q + i / 2 * 8,
                                                     k + n * 8 + i % 2);
          next[i / 2] = fmaxf(next[i / 2], score[n][i]);
        }
      }
      float shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        next[r] = over_quad(next[r], Larger());
        shift[r] = OnlineSum<float>::shift(next[r]);
        correction[r] = two_to(top[r] - shift[r]);
        total[r] *= correction[r];
        top[r] = next[r];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[n][i] = two_to(score[n][i] - shift[i / 2]);
          total[i / 2] += score[n][i];
        }
      }
      if (!kPlain && p.dropout > 0) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            score[n][i] *=
                dropout_factor(p, counters_of(p.rng), b, h, q + i / 2 * 8, k + n * 8 + i % 2);
        }
      }
      SplitPart<4> weights[2];
      split_scores(weights, score);
#pragma unroll
      for (int panel = 0; panel < N; ++panel) {
        float c[4][4];
        weigh_sixteen(c, weights, stage + kBytes + panel * kRows * kPanelRow, row);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sum[panel][j][i] = sum[panel][j][i] * correction[i / 2] + c[j][i];
        }
      }
    }
    __syncthreads();  // the next stage but one goes where this one is
  }
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = over_quad(total[r], Plus());
    // A query that sees no key gets zeros.
    inverse[r] = total[r] > 0.f || total[r] != total[r] ? 1.f / total[r] : 0.f;
    const int q = mine + lane / 4 + 8 * r;
    if (lane % 4 == 0 && q < queries) lse[pair * p.queries + q] = top[r] * kLogOf2 + logf(total[r]);
  }
  write_sums(out.at(b, h), out.row, mine, queries, static_cast<int>(p.value_width), sum, inverse[0],
             inverse[1]);
}

}  // namespace

bool float_forward(const Launch& launch, const Tensor& out, const Tensor& lse,
                   const Tensor& rng_state, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& mask, double dropout_p, bool is_causal,
                   double scale, const PhiloxArgs& rng) {
  return visit_panels(
      query, key, value, !mask.defined() && dropout_p == 0, [&]<int N, bool kPlain>() {
        Problem<float> p(query, key, value, mask, dropout_p, is_causal, scale);
        p.rng = rng;
        const Operand<float> target(out);
        if (!in_fours(p.query) || !in_fours(p.key) || !in_fours(p.value) || !in_fours(target))
          return false;
        const WarpRows spread(p.queries);
        constexpr int kBytes = 4 * kOperandBytes<N>;
        allow_shared_memory(float_forward_kernel<N, kPlain>, kBytes);
        launch(float_forward_kernel<N, kPlain>, tile_grid(p.batch * p.heads, spread.blocks, 1),
               dim3(static_cast<unsigned>(spread.warps * kWarp)), kBytes, p, target,
               lse.data_as<float>(), rng_state.data_as<int64_t>(), spread.blocks);
        return true;
      });
}

}  // namespace vt::cuda::attention
