// Gradients of attention over long sequences (attention_long.h): numbers of queries, the kernel,
// sums over query heads that share a key head.
#include "core/kernel_switches.h"
#include "cuda/kernels/attention_long_gradients.cuh"
#include "cuda/kernels/attention_tiles.h"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda::attention {
namespace {

constexpr int kThreadsOfHeads = 256, kRowsOfHeads = kThreadsOfHeads / kPieces;

/// Sums over the query heads that share a key head, in pieces of 8. With kSums also over the block's
/// 32 rows, of the sums as they are written.
template <class S, bool kSums>
__global__ void __launch_bounds__(kThreadsOfHeads)
    sum_heads(Operand<S> key_out, Operand<S> value_out, const S* dk, const S* dv, int key_heads,
              int sharing, int length, int64_t pieces, SumParts partial) {
  const Operand<S> out = blockIdx.y ? value_out : key_out;
  const S* const parts = blockIdx.y ? dv : dk;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= pieces) return;
  const int piece = at % kPieces, row = at / kPieces % length;
  const int64_t pair = at / kPieces / length;
  float sum[8] = {};
  for (int r = 0; r < sharing; ++r) {
    const uint4 part = __ldcs(reinterpret_cast<const uint4*>(
        parts + ((pair * sharing + r) * length + row) * kHeadWidth + piece * 8));
    const S* x = reinterpret_cast<const S*>(&part);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += convert<float>(x[c]);
  }
  const uint4 written = make_uint4(pack<S>(sum[0], sum[1]), pack<S>(sum[2], sum[3]),
                                   pack<S>(sum[4], sum[5]), pack<S>(sum[6], sum[7]));
  *reinterpret_cast<uint4*>(out.at(pair / key_heads, pair % key_heads) + row * out.row +
                            piece * 8) = written;
  if constexpr (kSums) {
    // A warp has 4 rows, 8 lanes each.
    constexpr int kWarps = kThreadsOfHeads / kWarp;
    __shared__ float of_warps[kWarps * kHeadWidth];
    const S* x = reinterpret_cast<const S*>(&written);
    float* const own = of_warps + threadIdx.x / kWarp * kHeadWidth;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float rows = convert<float>(x[c]);
      rows += __shfl_xor_sync(0xffffffffu, rows, 8);
      rows += __shfl_xor_sync(0xffffffffu, rows, 16);
      if (threadIdx.x % kWarp < kPieces) own[piece * 8 + c] = rows;
    }
    __syncthreads();
    float* const to = blockIdx.y ? partial.value : partial.key;
    const int column = threadIdx.x;
    if (!to || column >= kHeadWidth) return;
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += of_warps[w * kHeadWidth + column];
    const int64_t block = pair / key_heads * (length / kRowsOfHeads) + row / kRowsOfHeads;
    to[(block * key_heads + pair % key_heads) * kHeadWidth + column] = total;
  }
}

template <class S>
bool run(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
         const Tensor& grad_value, const Tensor& grad, const Tensor& query, const Tensor& key,
         const Tensor& value, const Tensor& output, const Tensor& lse, bool is_causal,
         double scale, const GradientSums& wanted) {
  const auto q = query.sizes();
  LongGradients<S> g{};
  g.query_out = Operand<S>(grad_query);
  g.key_out = Operand<S>(grad_key);
  g.value_out = Operand<S>(grad_value);
  const Operand<S> operands[] = {Operand<S>(query), Operand<S>(key),    Operand<S>(value),
                                 Operand<S>(grad),  Operand<S>(output), g.query_out,
                                 g.key_out,         g.value_out};
  for (const Operand<S>& t : operands) {
    if (!in_pieces(t)) return false;
  }
  if (!describe_rows(g.query, query, kRows) || !describe_rows(g.grad, grad, kRows) ||
      !describe_rows(g.key, key, kRows) || !describe_rows(g.value, value, kRows))
    return false;
  const int key_heads = static_cast<int>(key.sizes()[1]), length = static_cast<int>(q[2]);
  g.heads = static_cast<int>(q[1]);
  g.sharing = g.heads / key_heads;
  g.units = static_cast<int>(q[0]) * g.heads;
  g.tiles = length / kRows;
  g.causal = is_causal;
  g.scale = static_cast<float>(scale);
  const int blocks = std::min(g.units, launch.properties().multiprocessors);
  const auto rows = static_cast<size_t>(g.units) * static_cast<size_t>(length);
  const Scratch numbers(2 * rows * sizeof(float), launch);
  const Scratch sums(
      static_cast<size_t>(blocks) * static_cast<size_t>(length) * kHeadWidth * sizeof(float),
      launch);
  auto* const shift = numbers.data<float>();
  query_numbers(launch, shift, shift + rows, grad, output, lse);
  g.shift = shift;
  g.centre = shift + rows;
  g.sums = sums.data<float>();
  const size_t parts_bytes = g.sharing > 1 ? rows * kHeadWidth * sizeof(S) : 0;
  const Scratch parts(2 * parts_bytes, launch);
  auto* const dk = parts.data<S>();
  if (g.sharing > 1) {
    g.key_out.data = dk;
    g.key_out.row = kHeadWidth;
    g.key_out.head = int64_t{length} * kHeadWidth;
    g.key_out.batch = g.heads * g.key_out.head;
    g.value_out = g.key_out;
    g.value_out.data = dk + rows * kHeadWidth;
  }
  const int64_t query_rows = q[0] * kSummingWarps;
  const PartialSums partial(launch, wanted, query_rows,
                            g.sharing > 1 ? q[0] * (length / kRowsOfHeads) : query_rows);
  const auto with = [&](auto* kernel, auto* heads_kernel, int bytes) {
    SumParts parts = partial.parts();
    if (g.sharing > 1) parts.key = parts.value = nullptr;
    allow_shared_memory(kernel, bytes);
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLongThreads), bytes, g, parts);
    if (g.sharing == 1) return;
    const int64_t pieces = q[0] * key_heads * length * kPieces;
    launch(heads_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(pieces, kThreadsOfHeads)), 2),
           dim3(kThreadsOfHeads), 0, Operand<S>(grad_key), Operand<S>(grad_value), dk,
           g.value_out.data, key_heads, g.sharing, length, pieces, partial.parts());
  };
  if (wanted.wanted()) {
    with(long_gradients<S, true>, sum_heads<S, true>, kLongSumsBytes);
    partial.add(launch);
  } else {
    with(long_gradients<S, false>, sum_heads<S, false>, kLongBytes);
  }
  return true;
}

/// Whether the kernels are faster than cuDNN's, as measured on an H200, or cuDNN's are not to be had.
bool chosen(const Launch& launch, const Tensor& query, bool is_causal) {
  const auto q = query.sizes();
  const int64_t units = q[0] * q[1], length = q[2];
  const int64_t most = launch.properties().multiprocessors, rounds = ceil_div(units, most);
  // In the last round some multiprocessors may have nothing to do; the longer the sequence, the
  // less that may cost.
  const int64_t percent = length > 1024 ? 95 : is_causal ? 70 : 90;
  if (length <= (is_causal ? 2048 : 512) && units * 100 >= rounds * most * percent) return true;
  // For sums in a fixed order cuDNN needs all scores in memory, and it is not asked for so many.
  const bool ordered = kernel_switch(KernelSwitch::DeterministicAlgorithms);
  if (!(ordered && units * length * length > int64_t{1} << 30) && !without_cudnn()) return false;
  return units * 4 >= most || length <= 1024;  // a block takes whole heads: few leave much idle
}

}  // namespace

bool long_backward(const Launch& launch, const Tensor& grad_query, const Tensor& grad_key,
                   const Tensor& grad_value, const Tensor& grad, const Tensor& query,
                   const Tensor& key, const Tensor& value, const Tensor& output, const Tensor& lse,
                   bool is_causal, double scale, const GradientSums& sums) {
  // Keys that a query must not see are -inf before they are scaled.
  if (!long_shapes(launch, query, key, value) || !chosen(launch, query, is_causal) ||
      !(scale > 0) || lse.dtype() != DType::Float32 || !lse.is_contiguous())
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
