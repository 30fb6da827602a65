// Attention of short sequences, a block for each head (attention_head.h). Forward: a warp has 16
// queries and all their scores in registers. Backward: a warp first has 16 keys, makes the scores
// again from the saved log-sum-exp, transposed, sums the gradients of its keys and values, and leaves
// the gradients of the scores in shared memory; then it has 16 queries and sums theirs from these.
#include "cuda/kernels/attention_head.h"

#include "core/kernel_switches.h"
#include "cuda/kernels/attention_head.cuh"
#include "cuda/kernels/attention_sums.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda::attention {
namespace {

constexpr int kMostRows = 128;

template <class S, int kWidth, int kTiles>
__global__ void __launch_bounds__(kTiles* kWarp, kTiles <= 4 ? 5 : kTiles == 5 ? 4 : 2)
    forward_head(const __grid_constant__ HeadProblem<S> p, Operand<S> out, float* lse) {
  constexpr int kPieces = pieces_of<kWidth>;
  constexpr uint32_t kTileBytes = tile_bytes<kWidth>;
  extern __shared__ __align__(128) char memory[];
  const uint32_t query = shared_address(memory), key = query + kTiles * kTileBytes,
                 value = key + kTiles * kTileBytes;
  const Lanes<kWidth> at;
  const int pair = blockIdx.x, b = pair / p.heads, h = pair % p.heads;
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / kWarp, first = mine * 16;
  const int length = p.length, tiles = (length + 15) / 16;
  const uint32_t own = mine * kTileBytes;
  start_rows(query + own, at, p.query.at(b, h), p.query.row, first, length);
  start_rows(key + own, at, p.key.at(b, h), p.key.row, first, length);
  commit_copies();
  start_rows(value + own, at, p.value.at(b, h), p.value.row, first, length);
  commit_copies();
  wait_for_copies<1>();
  __syncthreads();

  const int last = p.causal ? mine : tiles - 1;  // tile of keys that is seen
  float scores[kTiles][2][4];
  {
    uint32_t left[kWidth / 16][4];
    load_left(left, query + own, at);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j <= last) dot_16<S>(scores[j], left, key + j * kTileBytes, at);
    }
  }
  float top[2] = {minus_infinity<float>(), minus_infinity<float>()};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j > last) continue;
    if (j * 16 + 16 > length || (p.causal && j == mine)) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = j * 16 + n * 8 + lane % 4 * 2 + i % 2, q = first + lane / 4 + i / 2 * 8;
          if (k >= length || (p.causal && k > q)) scores[j][n][i] = minus_infinity<float>();
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = Larger()(top[i / 2], scores[j][n][i]);
    }
  }
  float total[2] = {0.f, 0.f}, shift[2];
  const float factor = p.scale * kLog2E;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = Larger()(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
    top[r] = Larger()(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    shift[r] = top[r] == minus_infinity<float>() ? 0.f : top[r] * factor;
  }
  float sum[kPieces][4];
  clear_fragments(sum);
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j > last) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][n][i] = power_of_two(scores[j][n][i] * factor - shift[i / 2]);
        total[i / 2] += scores[j][n][i];
      }
    }
    uint32_t weights[4];
    pack_left<S>(weights, scores[j]);
    add_16<S>(sum, weights, value + j * kTileBytes, at);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    // A query that sees no key gets zeros.
    const float inverse = total[r] > 0.f || total[r] != total[r] ? 1.f / total[r] : 0.f;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      sum[n][2 * r] *= inverse;
      sum[n][2 * r + 1] *= inverse;
    }
    const int q = first + lane / 4 + 8 * r;
    if (lane % 4 == 0 && q < length)
      lse[static_cast<int64_t>(pair) * length + q] = top[r] * p.scale + log_of(total[r]);
  }
  put_rows<S>(query + own, at, sum, 1.f);
  __syncwarp();
  write_rows(out.at(b, h), out.row, query + own, at, first, length);
}

template <class S>
struct HeadGradients {
  Operand<S> grad, output, query, key, value;
  const float* lse;
};

template <int kTiles>
struct ScoreGradients {
  // Bytes: an odd number of 16-byte pieces, so that rows fall into different banks.
  static constexpr int kRow = kTiles * 32 + 16;
};

template <int kWidth, int kTiles>
constexpr int backward_bytes() {
  constexpr int kRows = kTiles * 16;
  return 4 * kTiles * static_cast<int>(tile_bytes<kWidth>) +
         kRows * ScoreGradients<kTiles>::kRow + 2 * kRows * static_cast<int>(sizeof(float));
}

template <class S, int kWidth, int kTiles, bool kSums>
__global__ void __launch_bounds__(kTiles* kWarp,
                                  kTiles <= 5 ? (kTiles <= 4 ? 4 : 3) + (kWidth == 32) : 2)
    backward_head(const __grid_constant__ HeadProblem<S> p,
                  const __grid_constant__ HeadGradients<S> g,
                  const __grid_constant__ SumParts parts) {
  constexpr int kPieces = pieces_of<kWidth>;
  constexpr uint32_t kTileBytes = tile_bytes<kWidth>;
  constexpr int kRows = kTiles * 16, kRow = ScoreGradients<kTiles>::kRow;
  extern __shared__ __align__(128) char memory[];
  const uint32_t query = shared_address(memory), key = query + kTiles * kTileBytes,
                 value = key + kTiles * kTileBytes, grad = value + kTiles * kTileBytes,
                 dscores = grad + kTiles * kTileBytes;  // keys by queries
  float* const lse = reinterpret_cast<float*>(memory + 4 * kTiles * kTileBytes + kRows * kRow);
  float* const along = lse + kRows;
  // Sums take the place of values, which only their own warp reads.
  constexpr int kSumsStride = kTileBytes / sizeof(float);
  static_assert(3 * kWidth <= kSumsStride);
  float* const sums = reinterpret_cast<float*>(memory + 2 * kTiles * kTileBytes);
  float* const own_sums = sums + threadIdx.x / kWarp * kSumsStride;
  const Lanes<kWidth> at;
  const int pair = blockIdx.x, b = pair / p.heads, h = pair % p.heads;
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / kWarp, first = mine * 16;
  const int length = p.length, tiles = (length + 15) / 16;
  const uint32_t own = mine * kTileBytes;
  start_rows(query + own, at, p.query.at(b, h), p.query.row, first, length);
  start_rows(key + own, at, p.key.at(b, h), p.key.row, first, length);
  start_rows(value + own, at, p.value.at(b, h), p.value.row, first, length);
  start_rows(grad + own, at, g.grad.at(b, h), g.grad.row, first, length);
  commit_copies();
  // along = Σ grad · output of every query: a thread a piece; a warp has rows of its own.
  {
    constexpr int kAccesses = Lanes<kWidth>::kAccesses, kStep = Lanes<kWidth>::kRowsAtOnce;
    uint4 outputs[kAccesses];
    const int row = first + lane / kPieces;
    const S* from = g.output.at(b, h) + row * g.output.row + lane % kPieces * 8;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      outputs[i] = make_uint4(0, 0, 0, 0);
      if (row + kStep * i < length)
        outputs[i] = *reinterpret_cast<const uint4*>(from + kStep * i * g.output.row);
    }
    if (lane < 16) {
      const int q = first + lane;
      const float value =
          q < length ? g.lse[static_cast<int64_t>(pair) * length + q] * kLog2E : 0.f;
      // A query that sees no key has weights of zero.
      lse[q] = value == minus_infinity<float>() ? -value : value;
    }
    wait_for_copies<0>();
    __syncwarp();  // a warp's rows are its own copies
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const uint4 other = load_piece(at.piece_of(grad + own, i));
      const S* x = reinterpret_cast<const S*>(&outputs[i]);
      const S* y = reinterpret_cast<const S*>(&other);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += convert<float>(x[c]) * convert<float>(y[c]);
#pragma unroll
      for (int other_lane = 1; other_lane < kPieces; other_lane *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, other_lane);
      if (lane % kPieces == 0) along[row + kStep * i] = sum;
    }
    __syncthreads();
  }
  const float factor = p.scale * kLog2E;
  if (mine < tiles) {
    uint32_t keys[kWidth / 16][4], values[kWidth / 16][4];
    load_left(keys, key + own, at);
    load_left(values, value + own, at);
    float dk[kPieces][4], dv[kPieces][4];
    clear_fragments(dk);
    clear_fragments(dv);
    for (int i = p.causal ? mine : 0; i < tiles; ++i) {
      float prob[2][4], dprob[2][4];
      dot_16<S>(prob, keys, query + i * kTileBytes, at);
      dot_16<S>(dprob, values, grad + i * kTileBytes, at);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int q = i * 16 + n * 8 + lane % 4 * 2;
        const float2 shift = *reinterpret_cast<const float2*>(lse + q);
        const float2 centre = *reinterpret_cast<const float2*>(along + q);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          prob[n][e] = power_of_two(prob[n][e] * factor - (e % 2 ? shift.y : shift.x));
          dprob[n][e] = prob[n][e] * (dprob[n][e] - (e % 2 ? centre.y : centre.x));
        }
      }
      if (first + 16 > length || i == tiles - 1 || (p.causal && i == mine)) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int k = first + lane / 4 + e / 2 * 8, q = i * 16 + n * 8 + lane % 4 * 2 + e % 2;
            if (k < length && q < length && !(p.causal && k > q)) continue;
            prob[n][e] = 0.f;
            dprob[n][e] = 0.f;
          }
        }
      }
      uint32_t left[4];
      pack_left<S>(left, prob);
      add_16<S>(dv, left, grad + i * kTileBytes, at);
      pack_left<S>(left, dprob);
      add_16<S>(dk, left, query + i * kTileBytes, at);
      const uint32_t to = dscores + (first + lane / 4) * kRow + i * 32 + lane % 4 * 4;
      store_pair(to, left[0]);
      store_pair(to + 8 * kRow, left[1]);
      store_pair(to + 16, left[2]);
      store_pair(to + 8 * kRow + 16, left[3]);
    }
    // The warp's rows of the values were its own, and are in registers.
    __syncwarp();
    put_rows<S>(value + own, at, dv, 1.f);
    __syncwarp();
    const float2 value_sums = write_rows_and_sum<kSums>(g.value.at(b, h), g.value.row, value + own,
                                                        at, first, length);
    __syncwarp();
    put_rows<S>(value + own, at, dk, p.scale);
    __syncwarp();
    const float2 key_sums = write_rows_and_sum<kSums>(g.key.at(b, h), g.key.row, value + own, at,
                                                      first, length);
    if constexpr (kSums) {
      __syncwarp();
      leave_sums<kWidth>(own_sums, kOfKey, key_sums);
      leave_sums<kWidth>(own_sums, kOfValue, value_sums);
    }
  }
  __syncthreads();
  if (mine < tiles) {
    float dq[kPieces][4];
    clear_fragments(dq);
    const int matrix = lane / 8, line = lane % 8;
    for (int j = 0; j < (p.causal ? mine + 1 : tiles); ++j) {
      uint32_t left[4];
      load_matrices_transposed(
          left, dscores + (j * 16 + matrix / 2 * 8 + line) * kRow + first * 2 + matrix % 2 * 16);
      add_16<S>(dq, left, key + j * kTileBytes, at);
    }
    put_rows<S>(query + own, at, dq, p.scale);
    __syncwarp();
    const float2 query_sums = write_rows_and_sum<kSums>(g.query.at(b, h), g.query.row, query + own,
                                                        at, first, length);
    if constexpr (kSums) leave_sums<kWidth>(own_sums, kOfQuery, query_sums);
  }
  if constexpr (kSums) {
    __syncthreads();
    write_partial_sums<kWidth>(parts, int64_t{pair} * kWidth, kOfQuery, kOfValue, sums,
                               kSumsStride, tiles);
  }
}

bool applies(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  // The largest score is the largest product. And cuDNN's kernels alone may have been asked for.
  if (!(scale > 0) || kernel_switch(KernelSwitch::CudnnSmallAttention))
    return false;
  const auto q = query.sizes();
  return (query.dtype() == DType::BFloat16 || query.dtype() == DType::Float16) &&
         (q[3] == 64 || q[3] == 32) && value.sizes()[3] == q[3] && q[2] <= kMostRows &&
         std::ranges::equal(q, key.sizes()) && q[0] * q[1] < (int64_t{1} << 31);
}

/// Calls f.template operator()<S, width, tiles of 16 rows>().
template <class F>
void visit_heads(const Tensor& query, F&& f) {
  const int64_t length = query.sizes()[2], width = query.sizes()[3];
  const auto of_width = [&]<class S, int kWidth>() {
    if (length <= 64)
      f.template operator()<S, kWidth, 4>();
    else if (length <= 80)
      f.template operator()<S, kWidth, 5>();
    else
      f.template operator()<S, kWidth, 8>();
  };
  const auto of_dtype = [&]<class S>() {
    if (width == 64)
      of_width.template operator()<S, 64>();
    else
      of_width.template operator()<S, 32>();
  };
  if (query.dtype() == DType::BFloat16)
    of_dtype.template operator()<__nv_bfloat16>();
  else
    of_dtype.template operator()<__half>();
}

template <class S>
HeadProblem<S> problem(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal,
                       double scale) {
  return {Operand<S>(query), Operand<S>(key), Operand<S>(value),
          static_cast<int>(query.sizes()[1]), static_cast<int>(query.sizes()[2]), is_causal,
          static_cast<float>(scale)};
}

}  // namespace

bool head_forward(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& query,
                  const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  if (!applies(query, key, value, scale)) return false;
  bool done = false;
  visit_heads(query, [&]<class S, int kWidth, int kTiles>() {
    const auto p = problem<S>(query, key, value, is_causal, scale);
    const Operand<S> target(out);
    if (!in_pieces(p.query) || !in_pieces(p.key) || !in_pieces(p.value) || !in_pieces(target))
      return;
    constexpr int kBytes = 3 * kTiles * static_cast<int>(tile_bytes<kWidth>);
    allow_shared_memory(forward_head<S, kWidth, kTiles>, kBytes);
    launch(forward_head<S, kWidth, kTiles>,
           dim3(static_cast<unsigned>(query.sizes()[0] * query.sizes()[1])), dim3(kTiles * kWarp),
           kBytes, p, target, lse.data_as<float>());
    done = true;
  });
  return done;
}

bool head_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums) {
  if (!applies(query, key, value, scale) || lse.dtype() != DType::Float32 || !lse.is_contiguous())
    return false;
  bool done = false;
  visit_heads(query, [&]<class S, int kWidth, int kTiles>() {
    const auto p = problem<S>(query, key, value, is_causal, scale);
    const HeadGradients<S> g{Operand<S>(grad),      Operand<S>(output),     Operand<S>(grad_query),
                             Operand<S>(grad_key), Operand<S>(grad_value), lse.data_as<float>()};
    const Operand<S> operands[] = {p.query,  p.key,   p.value, g.grad,
                                   g.output, g.query, g.key,   g.value};
    for (const Operand<S>& t : operands) {
      if (!in_pieces(t)) return;
    }
    constexpr int kBytes = backward_bytes<kWidth, kTiles>();
    const PartialSums partial(launch, sums, query.sizes()[0], query.sizes()[0]);
    const auto with = [&](auto* kernel) {
      allow_shared_memory(kernel, kBytes);
      launch(kernel, dim3(static_cast<unsigned>(query.sizes()[0] * query.sizes()[1])),
             dim3(kTiles * kWarp), kBytes, p, g, partial.parts());
    };
    if (sums.wanted()) {
      with(backward_head<S, kWidth, kTiles, true>);
      partial.add(launch);
    } else {
      with(backward_head<S, kWidth, kTiles, false>);
    }
    done = true;
  });
  return done;
}

}  // namespace vt::cuda::attention
