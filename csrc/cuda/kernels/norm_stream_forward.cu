// Forward of layer_norm and rms_norm, with the residual add before it, at the speed of memory.
#include "cuda/kernels/norm_stream.cuh"
#include "cuda/kernels/row_stream.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kMostThreads = 512;

/// S: rows and their sum. A: what is added. G: the result.
template <class S, class A, class G>
struct Rows {
  const S* input;
  const A* added;  // or null
  S* sum;
  G* out;
  Elements weight, bias;
  float* means;  // null: not centred
  float* rstds;
  float eps;
  int64_t rows;
  uint32_t added_rows;  // that come again; 0: as many as rows
};

/// blockDim.x threads a row, blockDim.y rows at a time; K pieces a thread.
template <class S, class A, class G, int K, bool kWarpRow, bool kWhole>
__global__ void __launch_bounds__(kMostThreads)
    norm_stream(const __grid_constant__ Rows<S, A, G> p, int length) {
  extern __shared__ __align__(16) char memory[];
  __shared__ RowMeeting meeting;
  const PiecesOfRow<K, kWarpRow, kWhole> pieces(length);
  const int n = pieces.n, step = pieces.step, first = pieces.first;
  auto* const weights = reinterpret_cast<float*>(memory);  // [n]
  auto* const biases = weights + n;                        // [n]
  const int row_bytes = bytes_of_row<S, A>(n, 1, p.added ? 1 : 0);
  char* const stages = memory + 2 * n * sizeof(float) + threadIdx.y * row_bytes;
  const int stage_bytes = blockDim.y * row_bytes;
  const auto input_at = [&](int slot) {
    return reinterpret_cast<S*>(stages + slot * stage_bytes) + first;
  };
  const auto added_after = [&](S* input) {
    return reinterpret_cast<A*>(input - first + n) + first;
  };
  const auto fetch = [&](int64_t row, int slot) {
    if (row < p.rows) {
      const int64_t start = row * n + first;
      S* const input = input_at(slot);
#pragma unroll
      for (int c = 0; c < K; ++c) {
        if (pieces.has(c)) copy_piece(input + c * step, p.input + start + c * step);
      }
      if (p.added) {
        A* const added = added_after(input);
        const int64_t same = p.added_rows ? static_cast<uint32_t>(row) % p.added_rows : row;
        const A* const from = p.added + same * n + first;
#pragma unroll
        for (int c = 0; c < K; ++c) {
          if (pieces.has(c)) copy_piece(added + c * step, from + c * step);
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
    float w[1], b[1];
    p.weight.template load_or<1>(i, w, 1.0f);
    p.bias.template load_or<1>(i, b, 0.0f);
    weights[i] = w[0];
    biases[i] = b[0];
  }
  __syncthreads();

  for (int turn = 0, slot = 0; row < p.rows; row += stride) {
    fetch(row + (kStages - 1) * stride, slot == 0 ? kStages - 1 : slot - 1);
    __pipeline_wait_prior(kStages - 1);
    S* const input = input_at(slot);
    float x[K][kPiece];
#pragma unroll
    for (int c = 0; c < K; ++c) load_piece_of(pieces, c, input, x[c]);
    if (p.added) {
      S* const sum = p.sum + row * n + first;
      A* const added = added_after(input);
#pragma unroll
      for (int c = 0; c < K; ++c) {
        float more[kPiece];
        load_piece_of(pieces, c, added, more);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) x[c][k] = convert<float>(convert<S>(x[c][k] + more[k]));
        if (pieces.has(c)) store_piece<S, float, kPiece>(sum + c * step, x[c]);
      }
    }
    float mean = 0;
    if (p.means) {
      float total[1] = {0};
#pragma unroll
      for (int c = 0; c < K; ++c) {
#pragma unroll
        for (int k = 0; k < kPiece; ++k) total[0] += x[c][k];
      }
      sum_over_row<kWarpRow>(total, meeting, turn++);
      mean = total[0] / static_cast<float>(n);
    }
    float squares[1] = {0};
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (!pieces.has(c)) continue;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) {
        x[c][k] -= mean;
        squares[0] += x[c][k] * x[c][k];
      }
    }
    sum_over_row<kWarpRow>(squares, meeting, turn++);
    const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(n) + p.eps);
    if (threadIdx.x == 0) {
      if (p.means) p.means[row] = mean;
      p.rstds[row] = rstd;
    }
    G* const out = p.out + row * n + first;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      float w[kPiece], b[kPiece];
      load_piece_of(pieces, c, weights + first, w);
      load_piece_of(pieces, c, biases + first, b);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) x[c][k] = x[c][k] * rstd * w[k] + b[k];
      if (pieces.has(c)) store_piece<G, float, kPiece>(out + c * step, x[c]);
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
}

template <class S, class A, class G>
bool launch_stream(const Launch& launch, const NormRows& g) {
  const int n = static_cast<int>(g.n);
  RowStreamShape shape;
  const int row_bytes = bytes_of_row<S, A>(n, 1, g.added.defined() ? 1 : 0);
  if (!shape.choose(launch, g.rows, n, row_bytes, 2, kMostThreads, kMostThreads, 2)) return false;
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.data() : nullptr; };
  const Rows<S, A, G> p{static_cast<const S*>(g.input.data()),
                     static_cast<const A*>(pointer(g.added)),
                     static_cast<S*>(pointer(g.sum)),
                     static_cast<G*>(g.out.data()),
                     Elements(g.weight),
                     Elements(g.bias),
                     g.mean.defined() ? g.mean.data_as<float>() : nullptr,
                     g.rstd.data_as<float>(),
                     static_cast<float>(g.eps),
                     g.rows,
                     g.added_rows == g.rows ? 0 : static_cast<uint32_t>(g.added_rows)};
  shape.visit([&]<int K, bool kWarpRow, bool kWhole>() {
    shape.run(launch, norm_stream<S, A, G, K, kWarpRow, kWhole>, p, n);
  });
  return true;
}

}  // namespace

bool stream_norm(const Launch& launch, const NormRows& g) {
  if (g.n % kPiece != 0 || g.n == 0 || g.n > kLongestStreamedRow || g.rows == 0) return false;
  const DType wide = g.input.dtype(), narrow = g.out.dtype();
  for (const Tensor* t : {&g.input, &g.sum, &g.added, &g.out}) {
    if (!t->defined()) continue;
    if (!is_aligned(t->data())) return false;
    if (t == &g.added ? t->dtype() != narrow && t->dtype() != wide
                      : t->dtype() != (t == &g.out ? narrow : wide))
      return false;
  }
  if (g.added_rows != g.rows && g.rows >= int64_t{1} << 32) return false;
  if (g.rstd.dtype() != DType::Float32) return false;
  return visit_row_dtypes(wide, narrow,
                          [&]<class S, class G>() {
                            if (g.added.defined() && g.added.dtype() == wide)
                              return launch_stream<S, S, G>(launch, g);
                            return launch_stream<S, G, G>(launch, g);
                          });
}

}  // namespace vt::cuda
