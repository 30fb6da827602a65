// The kernel of the gradients of attention over long sequences (attention_long.h), with Hopper's
// copies and products.
//
// A block has a head to itself. It takes 128 keys at a time, 64 for each of two warpgroups, and
// walks over the queries that see them, 128 at a time, which a third warpgroup brings from memory
// ahead of their use. Scores are made once, keys by queries, so that weights and their gradients
// ("slopes") are the left operands of the gradients of value and key without leaving registers.
// Through shared memory, turned, slopes are that of the query's gradient, each warpgroup adding the
// products of all 128 keys for 64 queries. Its sums over the keys are kept in memory, in float and
// as the threads hold them: since the same threads add to them, one after the other, their order is
// fixed, and none is cleared before or rounded after by another kernel. Sources: Dao et al.,
// "FlashAttention", NeurIPS 2022; Shah et al., "FlashAttention-3", 2024.
#pragma once

#include "cuda/kernels/attention_long.cuh"
#include "cuda/kernels/attention_sums.cuh"

namespace vt::cuda::attention {

inline constexpr int kStages = 2;
inline constexpr uint32_t kNumberBytes = kRows * sizeof(float);
inline constexpr uint32_t kStageBytes = 2 * kOperandBytes,
                          kStageCopies = kStageBytes + 2 * kNumberBytes;
// Places in shared memory: keys and values twice, queries and gradients in stages, gradients of
// scores twice, the numbers of queries, barriers.
inline constexpr uint32_t kStagesAt = 2 * kStageBytes, kSlopes = kStagesAt + kStages * kStageBytes,
                          kSlopeBytes = 4 * kHalf, kNumbers = kSlopes + 2 * kSlopeBytes,
                          kBarriers = kNumbers + kStages * 2 * kNumberBytes;
inline constexpr uint32_t kSumsAt = kBarriers + 8 * (2 * kStages + 4);
inline constexpr int kLongBytes = kSumsAt + 1024;
// With sums over rows, those of each warp behind the barriers.
inline constexpr int kSummingWarps = 2 * kWarpgroup / kWarp;
inline constexpr int kLongSumsBytes =
    kLongBytes + kSummingWarps * kWarpSums * static_cast<int>(sizeof(float));

template <class S>
struct LongGradients {
  CUtensorMap query, grad, key, value;
  const float *shift, *centre;  // of every query: log2 of its sum of exponentials, Σ grad · output
  float* sums;                  // of the gradients of queries, for each block
  Operand<S> query_out, key_out, value_out;  // the latter of every query head
  int heads, sharing, units, tiles;
  bool causal;
  float scale;
};

/// The tiles of queries that see a tile of keys, forward and backward by turns: those that were used
/// last come first, as the heads that are under way are more than the L2 cache holds. For them keys,
/// values and results, which are used once, leave it early.
struct QueryTiles {
  int first, step, count;

  __device__ QueryTiles(int keys, int tiles, bool causal)
      : first(keys % 2 ? tiles - 1 : causal ? keys : 0),
        step(keys % 2 ? -1 : 1),
        count(causal ? tiles - keys : tiles) {}
  __device__ int operator[](int t) const { return first + t * step; }
};

__device__ inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ inline void add_to(float* sums, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

/// Of 8 x 8 16-bit values, two of a row a lane, the transposed.
__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// write_sums(), and with kSums what the warp's 16 rows, as they are written, add up to in columns
/// 2 lane and the next.
template <bool kSums, class S>
__device__ inline float2 write_and_sum(S* to, int64_t stride, const Sums& sums, float scale) {
  write_sums<S, true>(to, stride, sums, scale);
  if constexpr (!kSums) {
    return make_float2(0.f, 0.f);
  } else {
    ColumnBlocks<S> blocks;
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      blocks.set(c, transposed(pack<S>(sums[c][0] * scale, sums[c][1] * scale)),
                 transposed(pack<S>(sums[c][2] * scale, sums[c][3] * scale)));
    }
    return blocks.of_lane();
  }
}

/// The sums over rows of a warp, whose lanes have two columns each, in memory of their own.
struct LaneSums {
  float2* at;

  __device__ void add(SumsOf kind, float2 sums, bool first) const {
    float2& mine = at[kind * kWarp];
    mine = first ? sums : make_float2(mine.x + sums.x, mine.y + sums.y);
  }
  __device__ void write(SumsOf kind, float* parts, int64_t place) const {
    if (parts)
      *reinterpret_cast<float2*>(parts + place + threadIdx.x % kWarp * 2) = at[kind * kWarp];
  }
};

template <class S, bool kSums>
__global__ void __launch_bounds__(kLongThreads, 1)
    long_gradients(const __grid_constant__ LongGradients<S> p,
                   const __grid_constant__ SumParts parts) {
#if VT_HOPPER_CODE
  extern __shared__ __align__(1024) char unaligned[];
  char* const memory = unaligned + (-shared_address(unaligned) & 1023);
  const uint32_t base = shared_address(memory);
  const uint32_t full = base + kBarriers, empty = full + 8 * kStages,
                 keys_full = empty + 8 * kStages, keys_empty = keys_full + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, 8);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(keys_full + 8 * i, 1);
      init_barrier(keys_empty + 8 * i, 8);
    }
    publish_barriers();
  }
  __syncthreads();
  const int length = p.tiles * kRows;
  int n = 0, m = 0;  // tiles of queries and of keys so far

  if (threadIdx.x < kWarpgroup) {
    keep_registers<24>();
    if (threadIdx.x != 0) return;
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
      const int b = unit / p.heads, h = unit % p.heads, kv = h / p.sharing;
      const int64_t numbers = int64_t{unit} * length;
      for (int j = 0; j < p.tiles; ++j, ++m) {
        const uint32_t keys = base + m % 2 * kStageBytes, arrived = keys_full + m % 2 * 8;
        wait(keys_empty + m % 2 * 8, (m / 2 + 1) % 2);
        arrive_expecting(arrived, kStageBytes);
        copy_tile_once(keys, &p.key, j * kRows, kv, b, arrived);
        copy_tile_once(keys + kOperandBytes, &p.value, j * kRows, kv, b, arrived);
        const QueryTiles queries(j, p.tiles, p.causal);
        for (int t = 0; t < queries.count; ++t, ++n) {
          const int i = queries[t], stage = n % kStages;
          const uint32_t to = base + kStagesAt + stage * kStageBytes, come = full + stage * 8;
          const uint32_t number = base + kNumbers + stage * 2 * kNumberBytes;
          wait(empty + stage * 8, (n / kStages + 1) % 2);
          arrive_expecting(come, kStageCopies);
          copy_tile(to, &p.query, i * kRows, h, b, come);
          copy_bytes(number, p.shift + numbers + i * kRows, kNumberBytes, come);
          copy_tile(to + kOperandBytes, &p.grad, i * kRows, h, b, come);
          copy_bytes(number + kNumberBytes, p.centre + numbers + i * kRows, kNumberBytes, come);
        }
      }
    }
    return;
  }

  take_registers<240>();
  const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
  const int group = threadIdx.x / kWarpgroup - 1;
  // The warp's 16 rows of 64; of columns 16 k on by exclusive or.
  const uint32_t own = warp * 2048 + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
  const float factor = p.scale * kLog2E;
  const LaneSums lane_sums{reinterpret_cast<float2*>(memory + kSumsAt) +
                           (group * 4 + warp) * kWarpSums / 2 + lane};
  float* const block_sums =
      p.sums + (int64_t{blockIdx.x} * p.tiles * 2 + group) * 64 * 64 + thread * 4;

  for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const int b = unit / p.heads, h = unit % p.heads;
    for (int j = 0; j < p.tiles; ++j, ++m) {
      const uint32_t keys_at = base + m % 2 * kStageBytes;
      wait(keys_full + m % 2 * 8, m / 2 % 2);
      uint32_t keys[4][4], values[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        load_matrices(keys[k], (keys_at + group * kHalf + own) ^ (k << 5));
        load_matrices(values[k], (keys_at + kOperandBytes + group * kHalf + own) ^ (k << 5));
      }
      Sums dk, dv;
      clear_fragments(dk);
      clear_fragments(dv);
      pin(dk);
      pin(dv);
      pin(keys);
      pin(values);
      const QueryTiles queries(j, p.tiles, p.causal);
      for (int t = 0; t < queries.count; ++t, ++n) {
        const int i = queries[t], stage = n % kStages;
        const uint32_t stage_at = base + kStagesAt + stage * kStageBytes;
        const uint32_t slopes_at = base + kSlopes + n % 2 * kSlopeBytes;
        const bool diagonal = p.causal && i == j;
        wait(full + stage * 8, n / kStages % 2);
#pragma unroll 1
        for (int s = 0; s < 2; ++s) {
          const uint32_t mine = slopes_at + (2 * s + group) * kHalf + own;
          if (diagonal && s < group) {
            const uint32_t zeros[4] = {};
#pragma unroll
            for (int k = 0; k < 4; ++k) store_matrices(mine ^ (k << 5), zeros);
            continue;
          }
          const uint64_t query = tile_operand(stage_at + s * kHalf),
                         grad = tile_operand(stage_at + kOperandBytes + s * kHalf);
          const float* const numbers =
              reinterpret_cast<const float*>(memory + kNumbers + stage * 2 * kNumberBytes) +
              s * 64 + lane % 4 * 2;
          Sums weights, slopes;
          begin_products();
#pragma unroll
          for (int k = 0; k < 4; ++k) product<S, 0>(weights, keys[k], query + k * kColumns16, k);
          commit_products();
#pragma unroll
          for (int k = 0; k < 4; ++k) product<S, 0>(slopes, values[k], grad + k * kColumns16, k);
          commit_products();
          wait_for_products<1>();
          pin(weights);
          if (diagonal && s == group) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int key = warp * 16 + lane / 4 + e / 2 * 8, at = c * 8 + lane % 4 * 2 + e % 2;
                if (key > at) weights[c][e] = minus_infinity<float>();
              }
            }
          }
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const float2 shift = *reinterpret_cast<const float2*>(numbers + c * 8);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              weights[c][e] = power_of_two(weights[c][e] * factor - (e % 2 ? shift.y : shift.x));
          }
          uint32_t left[4][4];
          pack_sums<S>(left, weights);
          wait_for_products<0>();
          pin(left);
          begin_products();
#pragma unroll
          for (int k = 0; k < 4; ++k) product<S, 1>(dv, left[k], grad + k * kRows16, 1);
          commit_products();
          pin(slopes);
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const float2 centre = *reinterpret_cast<const float2*>(numbers + kRows + c * 8);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              slopes[c][e] = weights[c][e] * (slopes[c][e] - (e % 2 ? centre.y : centre.x));
          }
          uint32_t turned[4][4];
          pack_sums<S>(turned, slopes);
          pin(turned);
          begin_products();
#pragma unroll
          for (int k = 0; k < 4; ++k) product<S, 1>(dk, turned[k], query + k * kRows16, 1);
          commit_products();
#pragma unroll
          for (int k = 0; k < 4; ++k) store_matrices(mine ^ (k << 5), turned[k]);
        }
        publish_shared();
        meet<1, 2 * kWarpgroup>();
        const bool first = j == 0, last = p.causal ? diagonal : j + 1 == p.tiles;
        float* const sums = block_sums + int64_t{i} * 2 * 64 * 64;
        const uint64_t all_slopes = tile_operand(slopes_at + group * 2 * kHalf),
                       all_keys = tile_operand(keys_at);
        Sums dq;
        begin_products();
#pragma unroll
        for (int k = 0; k < 8; ++k)
          product<S, 1, 1>(dq, all_slopes + k * kRows16, all_keys + k * kRows16, k);
        commit_products();
        wait_for_products<0>();
        pin(dq);
        // The queries were read by copies' and by ordinary instructions.
        publish_shared();
        __syncwarp();
        if (lane == 0) arrive(empty + stage * 8);
        if (!last) {
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            if (first)
              __stcg(reinterpret_cast<float4*>(sums + c * 512),
                     make_float4(dq[c][0], dq[c][1], dq[c][2], dq[c][3]));
            else
              add_to(sums + c * 512, dq[c]);
          }
        } else {
          if (!first) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const float4 earlier = __ldcg(reinterpret_cast<const float4*>(sums + c * 512));
              dq[c][0] += earlier.x;
              dq[c][1] += earlier.y;
              dq[c][2] += earlier.z;
              dq[c][3] += earlier.w;
            }
          }
          const Operand<S>& out = p.query_out;
          const float2 rows =
              write_and_sum<kSums>(out.at(b, h) + (int64_t{i} * kRows + group * 64) * out.row,
                                   out.row, dq, p.scale);
          if constexpr (kSums) lane_sums.add(kOfQuery, rows, p.causal ? j == 0 : t == 0);
        }
      }
      pin(dk);
      pin(dv);
      __syncwarp();
      if (lane == 0) arrive(keys_empty + m % 2 * 8);
      const int64_t row = int64_t{j} * kRows + group * 64;
      const float2 key_rows = write_and_sum<kSums>(p.key_out.at(b, h) + row * p.key_out.row,
                                                   p.key_out.row, dk, p.scale);
      if constexpr (kSums) lane_sums.add(kOfKey, key_rows, j == 0);
      const float2 value_rows = write_and_sum<kSums>(p.value_out.at(b, h) + row * p.value_out.row,
                                                     p.value_out.row, dv, 1.f);
      if constexpr (kSums) lane_sums.add(kOfValue, value_rows, j == 0);
    }
    if constexpr (kSums) {
      const int64_t place =
          ((int64_t{b} * kSummingWarps + group * 4 + warp) * p.heads + h) * kHeadWidth;
      lane_sums.write(kOfQuery, parts.query, place);
      lane_sums.write(kOfKey, parts.key, place);
      lane_sums.write(kOfValue, parts.value, place);
    }
  }
#endif
}

}  // namespace vt::cuda::attention
