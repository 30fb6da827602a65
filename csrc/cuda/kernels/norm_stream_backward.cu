// Backward of layer_norm and rms_norm at the speed of memory. The sums over rows (gradients of weight
// and bias, and of the bias of what comes before) stay in a thread's registers until the last row; then
// blocks write theirs, and a second kernel adds those up in order, or later one those of many norms.
#include "cuda/kernels/column_sums.cuh"
#include "cuda/kernels/norm_stream.cuh"
#include "cuda/kernels/row_stream.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kSums = 3;  // of dy * xhat, of dy, of low or total

/// S: input, residual, total. G: the incoming gradient, and the second copy of total.
template <class S, class G>
struct Rows {
  const S* input;
  const G* grad;
  const S* residual;  // or null
  S* total;
  G* low;  // or null
  Elements weight;
  const float* means;  // null: not centred
  const float* rstds;
  float* sums[kSums];  // null, or [blocks][n]
  int64_t rows;
  const G* terms[kMostTerms];  // what is added to grad, each sum rounded to S; null after the last
};

/// The most threads of a block with `pieces` pieces of a row a thread: their sums take 12 registers
/// a piece.
constexpr int most_threads(int pieces) { return pieces > 4 ? 384 : 512; }

template <class S>
__device__ inline float round_to(float value) {
  return convert<float>(convert<S>(value));
}

/// blockDim.x threads a row, blockDim.y rows at a time; K pieces a thread.
template <class S, class G, int K, bool kWarpRow, bool kWhole>
__global__ void __launch_bounds__(most_threads(K))
    norm_gradient_stream(const __grid_constant__ Rows<S, G> p, int length) {
  extern __shared__ __align__(16) char memory[];
  __shared__ RowMeeting meeting;
  const PiecesOfRow<K, kWarpRow, kWhole> pieces(length);
  const int n = pieces.n, step = pieces.step, first = pieces.first;
  auto* const weights = reinterpret_cast<float*>(memory);  // [n]
  // A stage holds rows of the input, of residuals where there are any, and of gradients.
  const int wide_rows = p.residual ? 2 : 1;
  int narrow_rows = 1;
#pragma unroll
  for (const G* term : p.terms) narrow_rows += term != nullptr;
  const int row_bytes = bytes_of_row<S, G>(n, wide_rows, narrow_rows);
  char* const stages = memory + n * sizeof(float) + threadIdx.y * row_bytes;
  const int stage_bytes = blockDim.y * row_bytes;
  const auto input_at = [&](int slot) {
    return reinterpret_cast<S*>(stages + slot * stage_bytes) + first;
  };
  const auto grad_after = [&](S* input) {
    return reinterpret_cast<G*>(input - first + wide_rows * n) + first;
  };
  const auto fetch = [&](int64_t row, int slot) {
    if (row < p.rows) {
      const int64_t start = row * n + first;
      S* const input = input_at(slot);
      G* const grad = grad_after(input);
#pragma unroll
      for (int c = 0; c < K; ++c) {
        if (!pieces.has(c)) continue;
        copy_piece(input + c * step, p.input + start + c * step);
        copy_piece(grad + c * step, p.grad + start + c * step);
      }
      if (p.residual) {
#pragma unroll
        for (int c = 0; c < K; ++c) {
          if (pieces.has(c)) copy_piece(input + n + c * step, p.residual + start + c * step);
        }
      }
      for (int t = 0; t < narrow_rows - 1; ++t) {
#pragma unroll
        for (int c = 0; c < K; ++c) {
          if (pieces.has(c))
            copy_piece(grad + (t + 1) * n + c * step, p.terms[t] + start + c * step);
        }
      }
    }
    __pipeline_commit();
  };

  const int64_t stride = int64_t{gridDim.x} * blockDim.y;
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(row + s * stride, s);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < n; i += threads) {
    float w[1];
    p.weight.template load_or<1>(i, w, 1.0f);
    weights[i] = w[0];
  }
  __syncthreads();

  float sums[kSums][K][kPiece];
#pragma unroll
  for (int kind = 0; kind < kSums; ++kind) {
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int k = 0; k < kPiece; ++k) sums[kind][c][k] = 0;
    }
  }
  float next_mean = 0, next_rstd = 0;
  const auto fetch_statistics = [&](int64_t at) {
    if (at >= p.rows) return;
    next_rstd = p.rstds[at];
    if (p.means) next_mean = p.means[at];
  };
  fetch_statistics(row);
  for (int turn = 0, slot = 0; row < p.rows; row += stride, ++turn) {
    fetch(row + (kStages - 1) * stride, slot == 0 ? kStages - 1 : slot - 1);
    const float mean = next_mean, rstd = next_rstd;
    fetch_statistics(row + stride);
    __pipeline_wait_prior(kStages - 1);
    S* const input = input_at(slot);
    const G* const grad = grad_after(input);
    // h = (x - mean) * rstd; the gradient is rstd * (g * w - mean(g * w) - h * mean(g * w * h)).
    float h[K][kPiece], g[K][kPiece];
    float both[2] = {0, 0};  // the sums of g * w * h and of g * w
    const float shift = -mean * rstd;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      load_piece_of(pieces, c, input, h[c]);
      load_piece_of(pieces, c, grad, g[c]);
    }
    for (int t = 0; t < narrow_rows - 1; ++t) {
#pragma unroll
      for (int c = 0; c < K; ++c) {
        float added[kPiece];
        load_piece_of(pieces, c, grad + (t + 1) * n, added);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) g[c][k] = round_to<S>(g[c][k] + added[k]);
      }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) {
      float w[kPiece];
      load_piece_of(pieces, c, weights + first, w);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        h[c][k] = h[c][k] * rstd + shift;
        sums[0][c][k] += g[c][k] * h[c][k];
        sums[1][c][k] += g[c][k];
        g[c][k] *= w[k];
        both[0] += g[c][k] * h[c][k];
        both[1] += g[c][k];
      }
    }
    sum_over_row<kWarpRow>(both, meeting, turn);
    const float slope = -both[0] * rstd / static_cast<float>(n);
    const float constant = p.means ? -both[1] * rstd / static_cast<float>(n) : 0;
#pragma unroll
    for (int c = 0; c < K; ++c) {
#pragma unroll
      for (int k = 0; k < kPiece; ++k)
        g[c][k] = round_to<S>(g[c][k] * rstd + (h[c][k] * slope + constant));
    }
    if (p.residual) {
#pragma unroll
      for (int c = 0; c < K; ++c) {
        float added[kPiece];
        load_piece_of(pieces, c, input + n, added);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) g[c][k] = round_to<S>(g[c][k] + added[k]);
      }
    }
    S* const total = p.total + row * n + first;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (pieces.has(c)) store_piece<S, float, kPiece>(total + c * step, g[c]);
    }
    if (p.low) {
      G* const low = p.low + row * n + first;
#pragma unroll
      for (int c = 0; c < K; ++c) {
#pragma unroll
        for (int k = 0; k < kPiece; ++k) g[c][k] = round_to<G>(g[c][k]);
        if (pieces.has(c)) store_piece<G, float, kPiece>(low + c * step, g[c]);
      }
    }
    if (p.sums[2]) {
#pragma unroll
      for (int c = 0; c < K; ++c) {
#pragma unroll
        for (int k = 0; k < kPiece; ++k) sums[2][c][k] += g[c][k];
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }

  // The block's sums, through the memory of the stages: [blockDim.y][n] of one kind at a time.
  __pipeline_wait_prior(0);
  auto* const lines = weights + n;
#pragma unroll
  for (int kind = 0; kind < kSums; ++kind) {
    if (!p.sums[kind]) continue;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (pieces.has(c))
        store_piece<float, float, kPiece>(lines + threadIdx.y * n + first + c * step,
                                          sums[kind][c]);
    }
    __syncthreads();
    for (int i = thread; i < n; i += threads) {
      float total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) total += lines[y * n + i];
      p.sums[kind][int64_t{blockIdx.x} * n + i] = total;
    }
  }
}

template <class S, class G>
bool launch_stream(const Launch& launch, const NormGradients& g) {
  const int n = static_cast<int>(g.n);
  RowStreamShape shape;
  const int row_bytes = bytes_of_row<S, G>(n, g.residual.defined() ? 2 : 1,
                                           1 + static_cast<int>(g.terms.size()));
  if (!shape.choose(launch, g.rows, n, row_bytes, 1, most_threads(4), most_threads(6), 1))
    return false;
  if (g.parts > 0) shape.blocks = std::min(shape.blocks, g.parts);
  const int64_t blocks = shape.blocks;
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.data() : nullptr; };
  Rows<S, G> p{static_cast<const S*>(pointer(g.input)),
               static_cast<const G*>(pointer(g.grad)),
               static_cast<const S*>(pointer(g.residual)),
               static_cast<S*>(pointer(g.total)),
               static_cast<G*>(pointer(g.low)),
               Elements(g.weight),
               static_cast<const float*>(pointer(g.mean)),
               static_cast<const float*>(pointer(g.rstd)),
               {},
               g.rows,
               {}};
  for (size_t t = 0; t < g.terms.size(); ++t) p.terms[t] = static_cast<const G*>(g.terms[t].data());
  const Tensor* const wanted[kSums] = {&g.weight_sums, &g.bias_sums, &g.row_sums};
  int64_t kinds = 0;
  for (const Tensor* t : wanted) kinds += t->defined() && g.parts == 0;
  const Scratch scratch(static_cast<size_t>(std::max<int64_t>(1, kinds * blocks * g.n)) *
                            sizeof(float),
                        launch);
  ColumnPartsList<float> parts;
  for (int kind = 0; kind < kSums; ++kind) {
    if (!wanted[kind]->defined()) continue;
    if (g.parts > 0) {
      p.sums[kind] = wanted[kind]->data_as<float>();
      clear_rows(*wanted[kind], blocks, launch);
      continue;
    }
    p.sums[kind] = scratch.data<float>() + parts.count * blocks * g.n;
    parts.add(*wanted[kind], p.sums[kind]);
  }
  shape.visit([&]<int K, bool kWarpRow, bool kWhole>() {
    shape.run(launch, norm_gradient_stream<S, G, K, kWarpRow, kWhole>, p, n);
  });
  add_column_parts(launch, parts, g.n, blocks);
  return true;
}

}  // namespace

bool stream_norm_gradients(const Launch& launch, const NormGradients& g) {
  if (g.n % kPiece != 0 || g.n == 0 || g.n > kLongestStreamedRow || g.rows == 0) return false;
  const DType wide = g.input.dtype(), narrow = g.grad.dtype();
  for (const Tensor* t : {&g.total, &g.input, &g.residual, &g.grad, &g.low}) {
    if (!t->defined()) continue;
    if (!is_aligned(t->data())) return false;
    if (t->dtype() != (t == &g.grad || t == &g.low ? narrow : wide)) return false;
  }
  for (const Tensor& term : g.terms) {
    if (!is_aligned(term.data()) || term.dtype() != narrow) return false;
  }
  if (g.rstd.dtype() != DType::Float32 || (g.mean.defined() && g.mean.dtype() != DType::Float32))
    return false;
  return visit_row_dtypes(wide, narrow,
                          [&]<class S, class G>() { return launch_stream<S, G>(launch, g); });
}

}  // namespace vt::cuda
