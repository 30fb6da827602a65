// Gradients of attention over tiles of 64 rows (attention_tiles.h). A block first has 64 keys of a
// head, 16 a warp, and walks over the queries that see them for the gradients of key and value; then
// it has the 64 queries of the same number and walks over the keys that they see. Of causal attention
// a block so has about the same to do whichever its number. What it walks over comes in two stages of
// shared memory, one on its way while the other is used.
#include "cuda/kernels/attention_tiles.h"

#include "core/kernel_switches.h"
#include "cuda/kernels/attention_head.cuh"
#include "cuda/kernels/attention_sums.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda::attention {
namespace {

constexpr int64_t kMostRows = 1024, kMostWholeRows = 256;
constexpr int kThreadsOfTile = 128;
constexpr uint32_t kOperand = 4 * kTileBytes;               // 64 rows
constexpr uint32_t kNumbers = kTile * sizeof(float);        // of 64 queries
constexpr uint32_t kStage = 2 * kOperand + 2 * kNumbers;
constexpr int kBytes = static_cast<int>(2 * kOperand + 2 * kStage);

template <class S>
struct TileGradients {
  Operand<S> grad, query, key, value;
  const float* shift;   // of every query, padded to whole tiles: log2 of its sum of exponentials,
  const float* centre;  // and Σ grad · output
  int tiles;
};

/// shift and centre, 8 threads a query.
template <class S>
__global__ void __launch_bounds__(256)
    query_number(float* shift, float* centre, Operand<S> grad, Operand<S> output, const float* lse,
                 int heads, int length, int padded) {
  const int q = blockIdx.x % (padded / 32) * 32 + threadIdx.x / kPieces;
  const int pair = blockIdx.x / (padded / 32), b = pair / heads, h = pair % heads;
  const int piece = threadIdx.x % kPieces;
  float sum = 0.f;
  if (q < length) {
    const uint4 left = *reinterpret_cast<const uint4*>(grad.at(b, h) + q * grad.row + piece * 8);
    const uint4 right =
        *reinterpret_cast<const uint4*>(output.at(b, h) + q * output.row + piece * 8);
    const S* x = reinterpret_cast<const S*>(&left);
    const S* y = reinterpret_cast<const S*>(&right);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum += convert<float>(x[c]) * convert<float>(y[c]);
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 4);
  if (piece != 0) return;
  const int64_t at = static_cast<int64_t>(pair) * padded + q;
  float value = q < length ? lse[static_cast<int64_t>(pair) * length + q] * kLog2E : 0.f;
  // A query that sees no key has weights of zero.
  if (value == minus_infinity<float>()) value = -value;
  shift[at] = value;
  centre[at] = sum;
}

template <class S>
__device__ inline void start_tile(uint32_t to, const Lanes<>& at, const Operand<S>& t, int b, int h,
                                  int tile, int length) {
  const int warp = threadIdx.x / kWarp;
  start_rows(to + warp * kTileBytes, at, t.at(b, h), t.row, tile * kTile + warp * 16, length);
}

template <class S, bool kSums>
__global__ void __launch_bounds__(kThreadsOfTile, 4)
    tile_gradients(const __grid_constant__ HeadProblem<S> p,
                   const __grid_constant__ TileGradients<S> g,
                   const __grid_constant__ SumParts parts) {
  extern __shared__ __align__(128) char memory[];
  const uint32_t first_own = shared_address(memory), second_own = first_own + kOperand,
                 stages = second_own + kOperand;
  const Lanes<> at;
  const int mine = blockIdx.x % g.tiles, pair = blockIdx.x / g.tiles;
  const int b = pair / p.heads, h = pair % p.heads, length = p.length;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = mine * kTile + warp * 16;  // the warp's rows
  const uint32_t own = warp * kTileBytes;
  const float factor = p.scale * kLog2E;
  const int64_t numbers = static_cast<int64_t>(pair) * g.tiles * kTile;
  // Sums take the place of stages that are not in use.
  float* const sums = reinterpret_cast<float*>(memory + 2 * kOperand);
  float* const own_sums = sums + warp * kWarpSums;
  const int64_t sums_at = ((int64_t{b} * g.tiles + mine) * p.heads + h) * kHeadWidth;

  const auto start_queries = [&](int i, int stage) {
    const uint32_t to = stages + stage * kStage;
    start_tile(to, at, p.query, b, h, i, length);
    start_tile(to + kOperand, at, g.grad, b, h, i, length);
    if (threadIdx.x < 32) {
      const float* from = (lane < 16 ? g.shift : g.centre) + numbers + i * kTile + lane % 16 * 4;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 2 * kOperand + lane * 16),
                   "l"(from)
                   : "memory");
    }
  };
  {
    start_tile(first_own, at, p.key, b, h, mine, length);
    start_tile(second_own, at, p.value, b, h, mine, length);
    const int begin = p.causal ? mine : 0;
    start_queries(begin, 0);
    commit_copies();
    uint32_t keys[4][4], values[4][4];
    float dk[kPieces][4], dv[kPieces][4];
    clear_fragments(dk);
    clear_fragments(dv);
    for (int i = begin; i < g.tiles; ++i) {
      if (i + 1 < g.tiles) start_queries(i + 1, (i + 1 - begin) % 2);
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      if (i == begin) {
        load_left(keys, first_own + own, at);
        load_left(values, second_own + own, at);
      }
      const uint32_t stage = (i - begin) % 2 * kStage, query = stages + stage,
                     grad = query + kOperand;
      const float* const shifts =
          reinterpret_cast<const float*>(memory + 2 * kOperand + stage + 2 * kOperand);
      for (int c = p.causal && i == mine ? warp : 0; c < 4; ++c) {
        float prob[2][4], dprob[2][4];
        dot_16<S>(prob, keys, query + c * kTileBytes, at);
        dot_16<S>(dprob, values, grad + c * kTileBytes, at);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int q = c * 16 + n * 8 + lane % 4 * 2;
          const float2 shift = *reinterpret_cast<const float2*>(shifts + q);
          const float2 centre = *reinterpret_cast<const float2*>(shifts + kTile + q);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            prob[n][e] = power_of_two(prob[n][e] * factor - (e % 2 ? shift.y : shift.x));
            dprob[n][e] = prob[n][e] * (dprob[n][e] - (e % 2 ? centre.y : centre.x));
          }
        }
        const int q0 = i * kTile + c * 16;
        if ((p.causal && i == mine && c == warp) || q0 + 16 > length) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int k = first + lane / 4 + e / 2 * 8, q = q0 + n * 8 + lane % 4 * 2 + e % 2;
              if (q < length && !(p.causal && k > q)) continue;
              prob[n][e] = 0.f;
              dprob[n][e] = 0.f;
            }
          }
        }
        uint32_t left[4];
        pack_left<S>(left, prob);
        add_16<S>(dv, left, grad + c * kTileBytes, at);
        pack_left<S>(left, dprob);
        add_16<S>(dk, left, query + c * kTileBytes, at);
      }
      __syncthreads();
    }
    // The warp's rows of keys and values were its own, and are in registers.
    put_rows<S>(first_own + own, at, dk, p.scale);
    put_rows<S>(second_own + own, at, dv, 1.f);
    __syncwarp();
    const float2 key_sums = write_rows_and_sum<kSums>(g.key.at(b, h), g.key.row, first_own + own, at,
                                                      first, length);
    const float2 value_sums = write_rows_and_sum<kSums>(g.value.at(b, h), g.value.row,
                                                        second_own + own, at, first, length);
    if constexpr (kSums) {
      leave_sums(own_sums, kOfKey, key_sums);
      leave_sums(own_sums, kOfValue, value_sums);
      __syncthreads();
      write_partial_sums(parts, sums_at, kOfKey, kOfValue, sums, kWarpSums, 4);
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  const auto start_keys = [&](int i, int stage) {
    const uint32_t to = stages + stage * kStage;
    start_tile(to, at, p.key, b, h, i, length);
    start_tile(to + kOperand, at, p.value, b, h, i, length);
  };
  start_tile(first_own, at, p.query, b, h, mine, length);
  start_tile(second_own, at, g.grad, b, h, mine, length);
  start_keys(0, 0);
  commit_copies();
  float shift[2], centre[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = g.shift[numbers + first + lane / 4 + 8 * r];
    centre[r] = g.centre[numbers + first + lane / 4 + 8 * r];
  }
  uint32_t queries[4][4], grads[4][4];
  float dq[kPieces][4];
  clear_fragments(dq);
  const int last = p.causal ? mine : g.tiles - 1;
  for (int i = 0; i <= last; ++i) {
    if (i < last) start_keys(i + 1, (i + 1) % 2);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    if (i == 0) {
      load_left(queries, first_own + own, at);
      load_left(grads, second_own + own, at);
    }
    const uint32_t key = stages + i % 2 * kStage, value = key + kOperand;
    for (int c = 0; c < (p.causal && i == mine ? warp + 1 : 4); ++c) {
      float prob[2][4], dprob[2][4];
      dot_16<S>(prob, queries, key + c * kTileBytes, at);
      dot_16<S>(dprob, grads, value + c * kTileBytes, at);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float weight = power_of_two(prob[n][e] * factor - shift[e / 2]);
          dprob[n][e] = weight * (dprob[n][e] - centre[e / 2]);
        }
      }
      const int k0 = i * kTile + c * 16;
      if ((p.causal && i == mine && c == warp) || k0 + 16 > length) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int k = k0 + n * 8 + lane % 4 * 2 + e % 2, q = first + lane / 4 + e / 2 * 8;
            if (k >= length || (p.causal && k > q)) dprob[n][e] = 0.f;
          }
        }
      }
      uint32_t left[4];
      pack_left<S>(left, dprob);
      add_16<S>(dq, left, key + c * kTileBytes, at);
    }
    __syncthreads();
  }
  put_rows<S>(first_own + own, at, dq, p.scale);
  __syncwarp();
  const float2 query_sums = write_rows_and_sum<kSums>(g.query.at(b, h), g.query.row, first_own + own,
                                                      at, first, length);
  if constexpr (kSums) {
    leave_sums(own_sums, kOfQuery, query_sums);
    __syncthreads();
    write_partial_sums(parts, sums_at, kOfQuery, kOfQuery, sums, kWarpSums, 4);
  }
}

template <class S>
bool run(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
         const Tensor& grad_value, const Tensor& grad, const Tensor& query, const Tensor& key,
         const Tensor& value, const Tensor& output, const Tensor& lse, bool is_causal,
         double scale, const GradientSums& sums) {
  const int heads = static_cast<int>(query.sizes()[1]), length = static_cast<int>(query.sizes()[2]);
  const HeadProblem<S> p{Operand<S>(query), Operand<S>(key), Operand<S>(value),        heads,
                         length,            is_causal,       static_cast<float>(scale)};
  TileGradients<S> g{Operand<S>(grad),       Operand<S>(grad_query), Operand<S>(grad_key),
                     Operand<S>(grad_value), nullptr,                nullptr,
                     ceil_div(length, kTile)};
  const Operand<S> out(output);
  const Operand<S> operands[] = {p.query, p.key, p.value, out, g.grad, g.query, g.key, g.value};
  for (const Operand<S>& t : operands) {
    if (!in_pieces(t)) return false;
  }
  const auto pairs = static_cast<unsigned>(query.sizes()[0] * heads);
  const size_t count = static_cast<size_t>(pairs) * static_cast<size_t>(g.tiles * kTile);
  const Scratch numbers(2 * count * sizeof(float), launch);
  auto* const shift = numbers.data<float>();
  query_numbers(launch, shift, shift + count, grad, output, lse);
  g.shift = shift;
  g.centre = shift + count;
  const int64_t rows = query.sizes()[0] * g.tiles;
  const PartialSums partial(launch, sums, rows, rows);
  const auto with = [&](auto* kernel) {
    allow_shared_memory(kernel, kBytes);
    launch(kernel, dim3(pairs * static_cast<unsigned>(g.tiles)), dim3(kThreadsOfTile), kBytes, p, g,
           partial.parts());
  };
  if (sums.wanted()) {
    with(tile_gradients<S, true>);
    partial.add(launch);
  } else {
    with(tile_gradients<S, false>);
  }
  return true;
}

/// Where they were measured to be faster than cuDNN, which takes whole tiles of 128 much better.
bool applies(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal) {
  // cuDNN's kernels alone were asked for.
  if (kernel_switch(KernelSwitch::CudnnSmallAttention)) return false;
  const auto q = query.sizes();
  if (q[3] != kHeadWidth || value.sizes()[3] != kHeadWidth || !std::ranges::equal(q, key.sizes()) ||
      q[0] * q[1] >= (int64_t{1} << 26))
    return false;
  return q[2] % 128 != 0 ? q[2] <= kMostRows : is_causal && q[2] <= kMostWholeRows;
}

}  // namespace

void query_numbers(const Launch& launch, float* shift, float* centre, const Tensor& grad,
                   const Tensor& output, const Tensor& lse) {
  const auto sizes = lse.sizes();
  const int heads = static_cast<int>(sizes[1]), length = static_cast<int>(sizes[2]);
  const int padded = ceil_div(length, kTile) * kTile;
  const auto blocks = static_cast<unsigned>(sizes[0] * sizes[1] * (padded / 32));
  const auto with = [&]<class S>() {
    launch(query_number<S>, dim3(blocks), dim3(256), 0, shift, centre, Operand<S>(grad),
           Operand<S>(output), lse.data_as<float>(), heads, length, padded);
  };
  if (grad.dtype() == DType::BFloat16)
    with.template operator()<__nv_bfloat16>();
  else
    with.template operator()<__half>();
}

bool tile_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums) {
  if (!applies(query, key, value, is_causal) || lse.dtype() != DType::Float32 ||
      !lse.is_contiguous())
    return false;
  const auto with = [&]<class S>() {
    return run<S>(launch, grad_query, grad_key, grad_value, grad, query, key, value, output, lse,
                  is_causal, scale, sums);
  };
  if (query.dtype() == DType::BFloat16) return with.template operator()<__nv_bfloat16>();
  if (query.dtype() == DType::Float16) return with.template operator()<__half>();
  return false;
}

}  // namespace vt::cuda::attention
