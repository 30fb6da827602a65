// Attention of float32 on tensor cores, backward (attention_float.cuh). Some blocks own keys and
// walk over the queries that see them, for the gradients of key and value; the others own queries
// and walk over keys. Scores are computed by both, so that every sum has one owner and a fixed
// order. Those of the first are transposed, keys by queries, and so are the left operand of both
// products.
#include "cuda/kernels/attention_float.cuh"
#include "cuda/kernels/attention_float.h"

namespace vt::cuda::attention {
namespace {

struct FloatGradients {
  Operand<float> grad, query, key, value;
  const float* shift;   // of every query: log2 of its sum of exponentials, inf if it sees no key
  const float* centre;  // and Σ grad · output
  int key_blocks, key_tiles, query_tiles;
};

/// shift and centre, 8 N lanes a query.
template <int N>
__global__ void __launch_bounds__(256)
    float_query_numbers(float* shift, float* centre, Operand<float> grad, Operand<float> output,
                        const float* lse, int64_t heads, int64_t queries, int64_t count,
                        int width) {
  constexpr int kLanes = 8 * N;
  const int64_t i = (int64_t{blockIdx.x} * 256 + threadIdx.x) / kLanes;
  const int c = static_cast<int>(threadIdx.x % kLanes) * 4;
  float sum = 0.f;
  if (i < count && c < width) {
    const int64_t q = i % queries, pair = i / queries, b = pair / heads, h = pair % heads;
    const float4 x = *reinterpret_cast<const float4*>(grad.at(b, h) + q * grad.row + c);
    const float4 y = *reinterpret_cast<const float4*>(output.at(b, h) + q * output.row + c);
    sum = x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w);
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (c != 0 || i >= count) return;
  const float value = lse[i] * kLog2OfE;
  // Then weights are zero.
  shift[i] = value == minus_infinity<float>() ? -value : value;
  centre[i] = sum;
}

__device__ inline PhiloxArgs rng_of(const Problem<float>& p) {
  if (!(p.dropout > 0)) return {};
  return {static_cast<uint64_t>(p.rng_state[0]), static_cast<uint64_t>(p.rng_state[1])};
}

/// From dot products q·k and g·v to the probability times dropout's factor, and the gradient of q·k
/// but for the scale.
template <bool kPlain>
__device__ inline void gradient_of_score(const Problem<float>& p, const PhiloxArgs& rng, bool seen,
                                         float factor, float& prob, float& dprob, float shift,
                                         float centre, int64_t b, int64_t h, int q, int k) {
  const float score = seen ? prob * factor : checked_score<kPlain>(p, prob, factor, b, h, q, k);
  // A masked score gives exactly 0, and so does a query that sees no key.
  const bool never = score == minus_infinity<float>() || shift == -minus_infinity<float>();
  const float value = never ? 0.f : two_to(score - shift);
  const float kept = !kPlain && p.dropout > 0 ? dropout_factor(p, rng, b, h, q, k) : 1.f;
  dprob = never ? 0.f : value * (dprob * kept - centre);
  prob = value * kept;
}

/// What a stage has: rows of two operands and, of queries, two numbers each.
template <int N>
inline constexpr int kGradientStage = 2 * kOperandBytes<N> + 2 * kStageRows<N> * 4;

template <int N, bool kPlain>
__device__ void float_key_value_gradients(const Problem<float>& p, const FloatGradients& g,
                                          char* memory, int block) {
  constexpr int kRows = kStageRows<N>, kBytes = kOperandBytes<N>;
  const uint32_t stages = shared_place(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRowsOfWarp;
  const int first = block % g.key_tiles * rows, mine = first + warp * kRowsOfWarp;
  const int64_t pair = block / g.key_tiles, b = pair / p.key_heads, kv = pair % p.key_heads;
  const int64_t sharing = p.heads / p.key_heads;
  const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
  const int width = static_cast<int>(p.width), value_width = static_cast<int>(p.value_width);
  const PhiloxArgs rng = kPlain ? PhiloxArgs{} : rng_of(p);
  const float factor = p.scale * kLog2OfE;
  // Queries before the first key do not see it. Stages are counted over all heads.
  const int begin = p.causal ? min(first, queries) / kRows * kRows : 0;
  const int each = (queries - begin + kRows - 1) / kRows;
  const int count = each * static_cast<int>(sharing);
  const auto start = [&](int i) {
    const int64_t h = kv * sharing + i / each;
    const int q0 = begin + i % each * kRows;
    const uint32_t to = stages + i % 2 * kGradientStage<N>;
    const int some = min((queries - q0 + 15) / 16 * 16, kRows);
    start_panels<N>(to, kRows, p.query.at(b, h), p.query.row, q0, some, queries, width);
    start_panels<N>(to + kBytes, kRows, g.grad.at(b, h), g.grad.row, q0, some, queries,
                    value_width);
    for (int j = threadIdx.x; j < 2 * kRows; j += blockDim.x) {
      const int q = q0 + j % kRows;
      const float* from = j < kRows ? g.shift : g.centre;
      const int64_t at = q < queries ? (b * p.heads + h) * p.queries + q : 0;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + 2 * kBytes + j * 4),
                   "l"(from + at), "r"(q < queries ? 4 : 0)
                   : "memory");
    }
  };
  if (count > 0) start(0);
  commit_stage();
  const LeftOperand<N, false> key(p.key.at(b, kv), p.key.row, mine, keys, width);
  const LeftOperand<N, false> value(p.value.at(b, kv), p.value.row, mine, keys, value_width);
  float dk[N][4][4], dv[N][4][4];
  clear_sums(dk);
  clear_sums(dv);
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count) start(i + 1);
    commit_stage();
    wait_for_stage<1>();
    __syncthreads();
    const int64_t h = kv * sharing + i / each;
    const int q0 = begin + i % each * kRows;
    const uint32_t query = stages + i % 2 * kGradientStage<N>, grad = query + kBytes;
    const float* const numbers =
        reinterpret_cast<const float*>(memory + i % 2 * kGradientStage<N> + 2 * kBytes);
    const int end = mine < keys ? min(queries - q0, kRows) : 0;
    for (int row = p.causal ? max(mine - q0, 0) / 16 * 16 : 0; row < end; row += 16) {
      float prob[2][4], dprob[2][4];
      dot_sixteen(prob, key, query, row);
      dot_sixteen(dprob, value, grad, row);
      const bool seen = all_seen(p, q0 + row, mine);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int c = row + n * 8 + lane % 4 * 2;
        const float2 shift = *reinterpret_cast<const float2*>(numbers + c);
        const float2 centre = *reinterpret_cast<const float2*>(numbers + kRows + c);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          gradient_of_score<kPlain>(p, rng, seen, factor, prob[n][e], dprob[n][e],
                                    e % 2 ? shift.y : shift.x, e % 2 ? centre.y : centre.x, b, h,
                                    q0 + c + e % 2, mine + lane / 4 + e / 2 * 8);
      }
      add_sixteen<N>(dv, prob, grad, row);
      add_sixteen<N>(dk, dprob, query, row);
    }
    __syncthreads();
  }
  write_sums(g.key.at(b, kv), g.key.row, mine, keys, width, dk, p.scale, p.scale);
  write_sums(g.value.at(b, kv), g.value.row, mine, keys, value_width, dv, 1.f, 1.f);
}

template <int N, bool kPlain>
__device__ void float_query_gradient(const Problem<float>& p, const FloatGradients& g, char* memory,
                                     int block) {
  constexpr int kRows = kStageRows<N>, kBytes = kOperandBytes<N>;
  const uint32_t stages = shared_place(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(blockDim.x) / kWarp * kRowsOfWarp;
  const int first = (g.query_tiles - 1 - block % g.query_tiles) * rows;
  const int mine = first + warp * kRowsOfWarp;
  const int64_t pair = block / g.query_tiles, b = pair / p.heads, h = pair % p.heads;
  const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
  const int width = static_cast<int>(p.width), value_width = static_cast<int>(p.value_width);
  const PhiloxArgs rng = kPlain ? PhiloxArgs{} : rng_of(p);
  const float factor = p.scale * kLog2OfE;
  const int limit = p.causal ? min(first + rows, keys) : keys;
  const int own = p.causal ? min(mine + kRowsOfWarp, keys) : keys;
  const float* const key = p.key.at(b, p.key_head(h));
  const float* const value = p.value.at(b, p.key_head(h));
  const auto start = [&](int k0) {
    const uint32_t to = stages + k0 / kRows % 2 * 2 * kBytes;
    const int count = min((limit - k0 + 15) / 16 * 16, kRows);
    start_panels<N>(to, kRows, key, p.key.row, k0, count, keys, width);
    start_panels<N>(to + kBytes, kRows, value, p.value.row, k0, count, keys, value_width);
  };
  start(0);
  commit_stage();
  const LeftOperand<N, false> query(p.query.at(b, h), p.query.row, mine, queries, width);
  const LeftOperand<N, false> grad(g.grad.at(b, h), g.grad.row, mine, queries, value_width);
  float shift[2], centre[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int q = mine + lane / 4 + 8 * r;
    shift[r] = q < queries ? g.shift[pair * p.queries + q] : 0.f;
    centre[r] = q < queries ? g.centre[pair * p.queries + q] : 0.f;
  }
  float dq[N][4][4];
  clear_sums(dq);
  for (int k0 = 0; k0 < limit; k0 += kRows) {
    if (k0 + kRows < limit) start(k0 + kRows);
    commit_stage();
    wait_for_stage<1>();
    __syncthreads();
    const uint32_t stage = stages + k0 / kRows % 2 * 2 * kBytes;
    const int end = mine < queries ? min(own - k0, kRows) : 0;
    for (int row = 0; row < end; row += 16) {
      float prob[2][4], dprob[2][4];
      dot_sixteen(prob, query, stage, row);
      dot_sixteen(dprob, grad, stage + kBytes, row);
      const bool seen = all_seen(p, mine, k0 + row);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          gradient_of_score<kPlain>(p, rng, seen, factor, prob[n][e], dprob[n][e], shift[e / 2],
                                    centre[e / 2], b, h, mine + lane / 4 + e / 2 * 8,
                                    k0 + row + n * 8 + lane % 4 * 2 + e % 2);
      }
      add_sixteen<N>(dq, dprob, stage, row);
    }
    __syncthreads();
  }
  write_sums(g.query.at(b, h), g.query.row, mine, queries, width, dq, p.scale, p.scale);
}

template <int N, bool kPlain>
__global__ void __launch_bounds__(kMostWarps* kWarp, N == 1 ? 2 : 1)
    float_gradients(const __grid_constant__ Problem<float> p,
                    const __grid_constant__ FloatGradients g) {
  extern __shared__ __align__(128) char memory[];
  const int block = static_cast<int>(blockIdx.x);
  if (block < g.key_blocks)
    float_key_value_gradients<N, kPlain>(p, g, memory, block);
  else
    float_query_gradient<N, kPlain>(p, g, memory, block - g.key_blocks);
}

}  // namespace

bool float_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                    const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                    const Tensor& key, const Tensor& value, const Tensor& mask,
                    const Tensor& output, const Tensor& lse, const Tensor& rng_state,
                    double dropout_p, bool is_causal, double scale) {
  if (lse.dtype() != DType::Float32 || !lse.is_contiguous()) return false;
  return visit_panels(
      query, key, value, !mask.defined() && dropout_p == 0, [&]<int N, bool kPlain>() {
        Problem<float> p(query, key, value, mask, dropout_p, is_causal, scale);
        p.rng_state = rng_state.data_as<int64_t>();
        FloatGradients g{};
        g.grad = Operand<float>(grad);
        g.query = Operand<float>(grad_query);
        g.key = Operand<float>(grad_key);
        g.value = Operand<float>(grad_value);
        const Operand<float> out(output);
        for (const Operand<float>& t :
             {p.query, p.key, p.value, out, g.grad, g.query, g.key, g.value}) {
          if (!in_fours(t)) return false;
        }
        const int64_t count = lse.numel();
        const Scratch numbers(2 * static_cast<size_t>(count) * sizeof(float), launch);
        auto* const shift = numbers.data<float>();
        launch(float_query_numbers<N>, tile_grid(ceil_div<int64_t>(count * 8 * N, 256), 1, 1),
               dim3(256), 0, shift, shift + count, g.grad, out, lse.data_as<float>(), p.heads,
               p.queries, count, static_cast<int>(p.value_width));
        g.shift = shift;
        g.centre = shift + count;
        // One size of blocks for both kinds.
        const WarpRows spread(std::max(p.queries, p.keys));
        const int64_t rows = spread.warps * kRowsOfWarp;
        g.key_tiles = static_cast<int>(ceil_div(p.keys, rows));
        g.query_tiles = static_cast<int>(ceil_div(p.queries, rows));
        const int64_t key_blocks = p.batch * p.key_heads * g.key_tiles;
        const int64_t blocks = key_blocks + p.batch * p.heads * g.query_tiles;
        const dim3 grid = tile_grid(blocks, 1, 1);
        g.key_blocks = static_cast<int>(key_blocks);
        constexpr int kBytes = 2 * kGradientStage<N>;
        allow_shared_memory(float_gradients<N, kPlain>, kBytes);
        launch(float_gradients<N, kPlain>, grid, dim3(static_cast<unsigned>(spread.warps * kWarp)),
               kBytes, p, g);
        return true;
      });
}

}  // namespace vt::cuda::attention
