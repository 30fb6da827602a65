// Attention over long sequences (attention_long.h), with Hopper's copies and products.
//
// A block takes 128 queries of a head, 64 for each of two warpgroups, and walks over the keys that
// they see, 128 at a time, from the last to the first; a third warpgroup brings keys and values
// from memory ahead of their use. Scores of the next keys are products that run while the weights
// of these are computed. Of causal attention a block takes the last queries of a head with the
// first, the last but one with the second, ..., so that all have the same to do. Sources: Dao et
// al., "FlashAttention", NeurIPS 2022; Shah et al., "FlashAttention-3", 2024.
#include "cuda/kernels/attention_long.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda::attention {
namespace {

constexpr int kKeyStages = 3;
// Places in shared memory: queries, keys and values in stages, barriers.
constexpr uint32_t kPairsAt = kOperandBytes, kPairBytes = 2 * kOperandBytes,
                   kBarriers = kPairsAt + kKeyStages * kPairBytes;
constexpr int kForwardBytes = kBarriers + 8 * (4 * kKeyStages + 2) + 1024;

template <class S>
struct LongAttention {
  CUtensorMap query, key, value;
  Operand<S> out;
  float* lse;
  int heads, sharing, units, tiles;
  bool causal;
  float scale;
};

/// What a unit of work is: tiles of queries of a head, one after the other.
struct Unit {
  int b, h, first, second;  // second < 0: none

  template <class S>
  __device__ Unit(const LongAttention<S>& p, int unit) {
    const int parts = p.causal ? (p.tiles + 1) / 2 : p.tiles, part = unit % parts,
              pair = unit / parts;
    b = pair / p.heads;
    h = pair % p.heads;
    first = p.causal ? p.tiles - 1 - part : part;
    second = p.causal && part != first ? part : -1;
  }
};

/// Weights of 128 keys, and what they change: the largest score so far, its sum of exponentials.
struct RunningRows {
  float top[2], total[2];

  __device__ RunningRows() : top{minus_infinity<float>(), minus_infinity<float>()}, total{} {}

  /// Turns scores into weights. What earlier sums are to be multiplied with goes to `correction`.
  template <class Halves>  // Sums, twice
  __device__ void weigh(Halves& scores, float factor, float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float next = top[r];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        next = fmaxf(next, fmaxf(scores[0][c][2 * r], scores[0][c][2 * r + 1]));
        next = fmaxf(next, fmaxf(scores[1][c][2 * r], scores[1][c][2 * r + 1]));
      }
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
      next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
      const float shift = next == minus_infinity<float>() ? 0.f : next * factor;
      correction[r] = power_of_two(top[r] * factor - shift);
      top[r] = next;
      float sum = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            scores[half][c][e] = power_of_two(scores[half][c][e] * factor - shift);
            sum += scores[half][c][e];
          }
        }
      }
      total[r] = total[r] * correction[r] + sum;
    }
  }
};

template <class S>
__global__ void __launch_bounds__(kLongThreads, 1)
    long_attention(const __grid_constant__ LongAttention<S> p) {
#if VT_HOPPER_CODE
  extern __shared__ __align__(1024) char unaligned[];
  const uint32_t start = shared_address(unaligned), base = start + (-start & 1023);
  const uint32_t queries_full = base + kBarriers, queries_empty = queries_full + 8,
                 keys_full = queries_empty + 8, keys_empty = keys_full + 8 * kKeyStages,
                 values_full = keys_empty + 8 * kKeyStages,
                 values_empty = values_full + 8 * kKeyStages;
  if (threadIdx.x == 0) {
    init_barrier(queries_full, 1);
    init_barrier(queries_empty, 8);
    for (int i = 0; i < kKeyStages; ++i) {
      init_barrier(keys_full + 8 * i, 1);
      init_barrier(keys_empty + 8 * i, 8);
      init_barrier(values_full + 8 * i, 1);
      init_barrier(values_empty + 8 * i, 8);
    }
    publish_barriers();
  }
  __syncthreads();
  int n = 0, m = 0;  // tiles of queries and of keys so far

  if (threadIdx.x < kWarpgroup) {
    keep_registers<24>();
    if (threadIdx.x != 0) return;
    for (int at = blockIdx.x; at < p.units; at += gridDim.x) {
      const Unit unit(p, at);
      const int kv = unit.h / p.sharing;
      for (int i = unit.first; i >= 0; i = i == unit.first ? unit.second : -1, ++n) {
        wait(queries_empty, (n + 1) % 2);
        arrive_expecting(queries_full, kOperandBytes);
        copy_tile(base, &p.query, i * kRows, unit.h, unit.b, queries_full);
        for (int j = p.causal ? i : p.tiles - 1; j >= 0; --j, ++m) {
          const int stage = m % kKeyStages, parity = (m / kKeyStages + 1) % 2;
          const uint32_t to = base + kPairsAt + stage * kPairBytes;
          wait(keys_empty + 8 * stage, parity);
          arrive_expecting(keys_full + 8 * stage, kOperandBytes);
          copy_tile(to, &p.key, j * kRows, kv, unit.b, keys_full + 8 * stage);
          wait(values_empty + 8 * stage, parity);
          arrive_expecting(values_full + 8 * stage, kOperandBytes);
          copy_tile(to + kOperandBytes, &p.value, j * kRows, kv, unit.b, values_full + 8 * stage);
        }
      }
    }
    return;
  }

  take_registers<240>();
  const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  const int group = threadIdx.x / kWarpgroup - 1;
  const uint32_t own =
      group * kHalf + warp * 2048 + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
  const float factor = p.scale * kLog2E;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };

  for (int at = blockIdx.x; at < p.units; at += gridDim.x) {
    const Unit unit(p, at);
    for (int i = unit.first; i >= 0; i = i == unit.first ? unit.second : -1, ++n) {
      uint32_t query[4][4];
      wait(queries_full, n % 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) load_matrices(query[k], (base + own) ^ (k << 5));
      pin(query);
      publish_shared();
      release(queries_empty);

      RunningRows rows;
      Sums scores[2], out;
      clear_fragments(out);
      float correction[2];
      const auto multiply_keys = [&](Sums(&to)[2], int stage) {
        const uint32_t keys = base + kPairsAt + stage * kPairBytes;
        const uint64_t lower = tile_operand(keys), upper = tile_operand(keys + kHalf);
#pragma unroll
        for (int k = 0; k < 4; ++k) product<S, 0>(to[0], query[k], lower + k * kColumns16, k);
#pragma unroll
        for (int k = 0; k < 4; ++k) product<S, 0>(to[1], query[k], upper + k * kColumns16, k);
        commit_products();
      };
      uint32_t left[2][4][4];
      const auto multiply_values = [&](int stage) {
        const uint64_t values = tile_operand(base + kPairsAt + stage * kPairBytes + kOperandBytes);
#pragma unroll
        for (int k = 0; k < 8; ++k) product<S, 1>(out, left[k / 4][k % 4], values + k * kRows16, 1);
        commit_products();
      };

      int stage = m % kKeyStages, parity = m / kKeyStages % 2;
      wait(keys_full + 8 * stage, parity);
      begin_products();
      multiply_keys(scores, stage);
      wait_for_products<0>();
      pin(scores[0]);
      pin(scores[1]);
      release(keys_empty + 8 * stage);
      if (p.causal) {
        const int q = group * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int c = 0; c < 16; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (c * 8 + lane % 4 * 2 + e % 2 > q + e / 2 * 8)
              scores[c / 8][c % 8][e] = minus_infinity<float>();
          }
        }
      }
      rows.weigh(scores, factor, correction);
      pack_sums<S>(left[0], scores[0]);
      pack_sums<S>(left[1], scores[1]);
      for (int j = (p.causal ? i : p.tiles - 1) - 1; j >= 0; --j) {
        const int earlier = stage, earlier_parity = parity;
        ++m;
        stage = m % kKeyStages;
        parity = m / kKeyStages % 2;
        wait(keys_full + 8 * stage, parity);
        pin(left[0]);
        pin(left[1]);
        pin(out);
        begin_products();
        multiply_keys(scores, stage);
        wait(values_full + 8 * earlier, earlier_parity);
        begin_products();
        multiply_values(earlier);
        wait_for_products<1>();
        pin(scores[0]);
        pin(scores[1]);
        release(keys_empty + 8 * stage);
        rows.weigh(scores, factor, correction);
        pin(scores[0]);  // so weights are made while products run
        pin(scores[1]);
        // What is before a loop is not moved after it by the assembler; this one, of a barrier that
        // is long open, ends at once.
        wait(values_full + 8 * earlier, earlier_parity);
        wait_for_products<0>();
        pin(out);
        release(values_empty + 8 * earlier);
        // What came before is mostly multiplied with one.
        if (__any_sync(0xffffffffu, correction[0] != 1.f || correction[1] != 1.f)) {
#pragma unroll
          for (int c = 0; c < 8; ++c) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[c][e] *= correction[e / 2];
          }
        }
        pack_sums<S>(left[0], scores[0]);
        pack_sums<S>(left[1], scores[1]);
      }
      ++m;
      wait(values_full + 8 * stage, parity);
      pin(left[0]);
      pin(left[1]);
      pin(out);
      begin_products();
      multiply_values(stage);
      float inverse[2];
      const int64_t first = int64_t{i} * kRows + group * 64;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = rows.total[r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        // A query that sees no number gets zeros.
        inverse[r] = total > 0.f || total != total ? 1.f / total : 0.f;
        if (lane % 4 == 0) {
          p.lse[(int64_t{unit.b} * p.heads + unit.h) * p.tiles * kRows + first + warp * 16 +
                lane / 4 + 8 * r] = rows.top[r] * p.scale + logf(total);
        }
      }
      wait_for_products<0>();
      pin(out);
      release(values_empty + 8 * stage);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[c][e] *= inverse[e / 2];
      }
      write_sums<S>(p.out.at(unit.b, unit.h) + first * p.out.row, p.out.row, out, 1.f);
    }
  }
#endif
}

template <class S>
bool run(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
         const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  LongAttention<S> p{};
  p.out = Operand<S>(out);
  const Operand<S> operands[] = {Operand<S>(query), Operand<S>(key), Operand<S>(value), p.out};
  for (const Operand<S>& t : operands) {
    if (!in_pieces(t)) return false;
  }
  if (!describe_rows(p.query, query, kRows) || !describe_rows(p.key, key, kRows) ||
      !describe_rows(p.value, value, kRows))
    return false;
  const auto q = query.sizes();
  p.lse = lse.data_as<float>();
  p.heads = static_cast<int>(q[1]);
  p.sharing = p.heads / static_cast<int>(key.sizes()[1]);
  p.tiles = static_cast<int>(q[2]) / kRows;
  p.causal = is_causal;
  p.scale = static_cast<float>(scale);
  p.units = static_cast<int>(q[0]) * p.heads * (is_causal ? (p.tiles + 1) / 2 : p.tiles);
  const int blocks = std::min(p.units, launch.properties().multiprocessors);
  allow_shared_memory(long_attention<S>, kForwardBytes);
  launch(long_attention<S>, dim3(static_cast<unsigned>(blocks)), dim3(kLongThreads), kForwardBytes,
         p);
  return true;
}

/// Whether the kernel is faster than cuDNN's: as measured on an H200, of causal sequences, where the
/// blocks' shares of work are even. Of 256 and 512 rows it is so where query, key and value lie in
/// one tensor, as most models have them.
bool faster(const Launch& launch, const Tensor& query, bool is_causal) {
  const auto q = query.sizes();
  const int64_t length = q[2], units = q[0] * q[1] * ((length / kRows + 1) / 2);
  const bool together = query.strides()[2] > q[1] * q[3];
  if (!is_causal || length < (together ? 256 : 1024) || length > 4096) return false;
  const int64_t most = launch.properties().multiprocessors, rounds = ceil_div(units, most);
  return units * 100 >= rounds * most * 90;
}

}  // namespace

bool long_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                  const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  if (!long_shapes(launch, query, key, value) || !(scale > 0) || !lse.is_contiguous()) return false;
  if (!faster(launch, query, is_causal) && !without_cudnn()) return false;  // which may open it
  if (query.dtype() == DType::BFloat16)
    return run<__nv_bfloat16>(launch, out, lse, query, key, value, is_causal, scale);
  if (query.dtype() == DType::Float16)
    return run<__half>(launch, out, lse, query, key, value, is_causal, scale);
  return false;
}

}  // namespace vt::cuda::attention
