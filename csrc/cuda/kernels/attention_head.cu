// Attention of short sequences, a block for each head (attention_head.h). Forward: a warp has 16
// queries and all their scores in registers. Backward: a warp first has 16 keys, makes the scores
// again from the saved log-sum-exp, transposed, sums the gradients of its keys and values, and leaves
// the gradients of the scores in shared memory; then it has 16 queries and sums theirs from these.
#include "cuda/kernels/attention_head.h"

#include "cuda/cudnn.h"
#include "cuda/kernels/attention_head.cuh"

namespace vt::cuda::attention {
namespace {

constexpr int kMostRows = 128;

template <class S, int kTiles>
__global__ void __launch_bounds__(kTiles* kWarp, kTiles <= 4 ? 5 : kTiles == 5 ? 4 : 2)
    forward_head(const __grid_constant__ HeadProblem<S> p, Operand<S> out, float* lse) {
  constexpr int kRows = kTiles * 16;
  extern __shared__ __align__(128) char memory[];
  const HeadTile<S> query{reinterpret_cast<S*>(memory)}, key{query.data + kRows * kHeadWidth},
      value{key.data + kRows * kHeadWidth};
  const int pair = blockIdx.x, b = pair / p.heads, h = pair % p.heads;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16, length = p.length;
  query.start(p.query.at(b, h), p.query.row, length, kRows);
  key.start(p.key.at(b, h), p.key.row, length, kRows);
  commit_copies();
  value.start(p.value.at(b, h), p.value.row, length, kRows);
  commit_copies();
  wait_for_copies<1>();
  __syncthreads();

  float scores[kTiles][2][4];
  {
    uint32_t left[4][4];
    load_left(left, query, first);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (p.causal && j * 16 > first) continue;
      dot_16(scores[j], left, key, j * 16);
    }
  }
  const int last = p.causal ? first / 16 : kTiles - 1;  // tile of keys that is seen
  float top[2] = {minus_infinity<float>(), minus_infinity<float>()};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (j > last) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = j * 16 + n * 8 + lane % 4 * 2 + i % 2, q = first + lane / 4 + i / 2 * 8;
        if (k >= length || (p.causal && k > q)) scores[j][n][i] = minus_infinity<float>();
        top[i / 2] = Larger()(top[i / 2], scores[j][n][i]);
      }
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
    add_16(sum, weights, value, j * 16);
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
  query.put(sum, 1.f, first);
  __syncwarp();
  query.write(out.at(b, h), out.row, first, length);
}

template <class S>
struct HeadGradients {
  Operand<S> grad, output, query, key, value;
  const float* lse;
};

template <int kTiles>
struct ScoreGradients {
  // An odd number of 16-byte pieces, so that rows fall into different banks.
  static constexpr int kRow = kTiles * 16 + 8;
};

template <class S, int kTiles>
constexpr int backward_bytes() {
  constexpr int kRows = kTiles * 16;
  return (4 * kRows * kHeadWidth + kRows * ScoreGradients<kTiles>::kRow) *
             static_cast<int>(sizeof(S)) +
         2 * kRows * static_cast<int>(sizeof(float));
}

template <class S, int kTiles>
__global__ void __launch_bounds__(kTiles* kWarp, kTiles <= 4 ? 4 : kTiles == 5 ? 3 : 2)
    backward_head(const __grid_constant__ HeadProblem<S> p,
                  const __grid_constant__ HeadGradients<S> g) {
  constexpr int kRows = kTiles * 16, kRow = ScoreGradients<kTiles>::kRow;
  extern __shared__ __align__(128) char memory[];
  const HeadTile<S> query{reinterpret_cast<S*>(memory)}, key{query.data + kRows * kHeadWidth},
      value{key.data + kRows * kHeadWidth}, grad{value.data + kRows * kHeadWidth};
  S* const dscores = grad.data + kRows * kHeadWidth;  // keys by queries
  float* const lse = reinterpret_cast<float*>(dscores + kRows * kRow);
  float* const along = lse + kRows;
  const int pair = blockIdx.x, b = pair / p.heads, h = pair % p.heads;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16, length = p.length;
  query.start(p.query.at(b, h), p.query.row, length, kRows);
  key.start(p.key.at(b, h), p.key.row, length, kRows);
  value.start(p.value.at(b, h), p.value.row, length, kRows);
  grad.start(g.grad.at(b, h), g.grad.row, length, kRows);
  commit_copies();
  // along = Σ grad · output of every query: 8 threads a row; a warp has rows of its own.
  {
    uint4 outputs[4];
    const S* from = g.output.at(b, h);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + i * 4 + lane / kPieces;
      outputs[i] = r < length ? *reinterpret_cast<const uint4*>(from + r * g.output.row +
                                                                lane % kPieces * 8)
                              : make_uint4(0, 0, 0, 0);
    }
    if (lane < 16) {
      const int q = first + lane;
      const float value =
          q < length ? g.lse[static_cast<int64_t>(pair) * length + q] * kLog2E : 0.f;
      // A query that sees no key has weights of zero.
      lse[q] = value == minus_infinity<float>() ? -value : value;
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + i * 4 + lane / kPieces;
      const uint4 other = *reinterpret_cast<const uint4*>(grad.piece(r, lane % kPieces));
      const S* x = reinterpret_cast<const S*>(&outputs[i]);
      const S* y = reinterpret_cast<const S*>(&other);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += convert<float>(x[c]) * convert<float>(y[c]);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      if (lane % kPieces == 0) along[r] = sum;
    }
    __syncthreads();
  }
  const int tiles = (length + 15) / 16, mine = first / 16;
  const float factor = p.scale * kLog2E;
  if (mine < tiles) {
    uint32_t keys[4][4], values[4][4];
    load_left(keys, key, first);
    load_left(values, value, first);
    float dk[kPieces][4], dv[kPieces][4];
    clear_fragments(dk);
    clear_fragments(dv);
    for (int i = p.causal ? mine : 0; i < tiles; ++i) {
      float prob[2][4], dprob[2][4];
      dot_16(prob, keys, query, i * 16);
      dot_16(dprob, values, grad, i * 16);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int q = i * 16 + n * 8 + lane % 4 * 2;
        const float2 shift = *reinterpret_cast<const float2*>(lse + q);
        const float2 centre = *reinterpret_cast<const float2*>(along + q);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int k = first + lane / 4 + e / 2 * 8;
          const bool seen = k < length && !(p.causal && k > q + e % 2);
          const float weight = power_of_two(prob[n][e] * factor - (e % 2 ? shift.y : shift.x));
          prob[n][e] = seen ? weight : 0.f;
          dprob[n][e] = seen ? weight * (dprob[n][e] - (e % 2 ? centre.y : centre.x)) : 0.f;
        }
      }
      uint32_t left[4];
      pack_left<S>(left, prob);
      add_16(dv, left, grad, i * 16);
      pack_left<S>(left, dprob);
      add_16(dk, left, query, i * 16);
      S* const to = dscores + (first + lane / 4) * kRow + i * 16 + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = left[0];
      *reinterpret_cast<uint32_t*>(to + 8 * kRow) = left[1];
      *reinterpret_cast<uint32_t*>(to + 8) = left[2];
      *reinterpret_cast<uint32_t*>(to + 8 * kRow + 8) = left[3];
    }
    // The warp's rows of the values were its own, and are in registers.
    __syncwarp();
    value.put(dv, 1.f, first);
    __syncwarp();
    value.write(g.value.at(b, h), g.value.row, first, length);
    __syncwarp();
    value.put(dk, p.scale, first);
    __syncwarp();
    value.write(g.key.at(b, h), g.key.row, first, length);
  }
  __syncthreads();
  if (mine < tiles) {
    float dq[kPieces][4];
    clear_fragments(dq);
    const int matrix = lane / 8, line = lane % 8;
    for (int j = 0; j < (p.causal ? mine + 1 : tiles); ++j) {
      uint32_t left[4];
      load_matrices_transposed(
          left, dscores + (j * 16 + matrix / 2 * 8 + line) * kRow + first + matrix % 2 * 8);
      add_16(dq, left, key, j * 16);
    }
    query.put(dq, p.scale, first);
    __syncwarp();
    query.write(g.query.at(b, h), g.query.row, first, length);
  }
}

bool applies(const Tensor& query, const Tensor& key, const Tensor& value) {
  // cuDNN's kernels alone were asked for.
  if (cudnn_settings().small_attention.load(std::memory_order_relaxed)) return false;
  const auto q = query.sizes();
  return (query.dtype() == DType::BFloat16 || query.dtype() == DType::Float16) &&
         q[3] == kHeadWidth && value.sizes()[3] == kHeadWidth && q[2] <= kMostRows &&
         std::ranges::equal(q, key.sizes()) && q[0] * q[1] < (int64_t{1} << 31);
}

/// Calls f.template operator()<S, tiles of 16 rows>().
template <class F>
void visit_heads(DType dtype, int64_t length, F&& f) {
  const auto with = [&]<class S>() {
    if (length <= 64)
      f.template operator()<S, 4>();
    else if (length <= 80)
      f.template operator()<S, 5>();
    else
      f.template operator()<S, 8>();
  };
  if (dtype == DType::BFloat16)
    with.template operator()<__nv_bfloat16>();
  else
    with.template operator()<__half>();
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
  if (!applies(query, key, value)) return false;
  bool done = false;
  visit_heads(query.dtype(), query.sizes()[2], [&]<class S, int kTiles>() {
    const auto p = problem<S>(query, key, value, is_causal, scale);
    const Operand<S> target(out);
    if (!in_pieces(p.query) || !in_pieces(p.key) || !in_pieces(p.value) || !in_pieces(target))
      return;
    constexpr int kBytes = 3 * kTiles * 16 * kHeadWidth * static_cast<int>(sizeof(S));
    allow_shared_memory(forward_head<S, kTiles>, kBytes);
    launch(forward_head<S, kTiles>,
           dim3(static_cast<unsigned>(query.sizes()[0] * query.sizes()[1])), dim3(kTiles * kWarp),
           kBytes, p, target, lse.data_as<float>());
    done = true;
  });
  return done;
}

bool head_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale) {
  if (!applies(query, key, value) || lse.dtype() != DType::Float32 || !lse.is_contiguous())
    return false;
  bool done = false;
  visit_heads(query.dtype(), query.sizes()[2], [&]<class S, int kTiles>() {
    const auto p = problem<S>(query, key, value, is_causal, scale);
    const HeadGradients<S> g{Operand<S>(grad),      Operand<S>(output),     Operand<S>(grad_query),
                             Operand<S>(grad_key), Operand<S>(grad_value), lse.data_as<float>()};
    const Operand<S> operands[] = {p.query,  p.key,   p.value, g.grad,
                                   g.output, g.query, g.key,   g.value};
    for (const Operand<S>& t : operands) {
      if (!in_pieces(t)) return;
    }
    constexpr int kBytes = backward_bytes<S, kTiles>();
    allow_shared_memory(backward_head<S, kTiles>, kBytes);
    launch(backward_head<S, kTiles>,
           dim3(static_cast<unsigned>(query.sizes()[0] * query.sizes()[1])), dim3(kTiles * kWarp),
           kBytes, p, g);
    done = true;
  });
  return done;
}

}  // namespace vt::cuda::attention
