// Forward of layer_norm and rms_norm, with the residual add before it, at the speed of memory.
#include "cuda/kernels/norm_stream.cuh"
#include "cuda/kernels/row_stream.cuh"

namespace vt::cuda {
namespace {

constexpr int kMostThreads = 512;

/// S: rows and their sum. G: what is added, and the result.
template <class S, class G>
struct Rows {
  const S* input;
  const G* added;  // or null
  S* sum;
  G* out;
  Elements weight, bias;
  float* means;  // null: not centred
  float* rstds;
  float eps;
  int64_t rows;
};

/// blockDim.x threads a row, blockDim.y rows at a time; K pieces a thread.
template <class S, class G, int K>
__global__ void __launch_bounds__(kMostThreads)
    norm_stream(const __grid_constant__ Rows<S, G> p, int n) {
  extern __shared__ __align__(16) char memory[];
  __shared__ RowMeeting meeting;
  const int step = blockDim.x * kPiece, first = threadIdx.x * kPiece;
  auto* const weights = reinterpret_cast<float*>(memory);  // [n], then biases [n]
  const int row_bytes = bytes_of_row<S, G>(n, 1, p.added ? 1 : 0);
  const auto stage = [&](int slot) {
    return memory + 2 * n * sizeof(float) +
           static_cast<size_t>(slot * blockDim.y + threadIdx.y) * row_bytes;
  };
  const auto fetch = [&](int64_t row, int slot) {
    if (row < p.rows) {
      auto* const input = reinterpret_cast<S*>(stage(slot));
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const int at = c * step + first;
        if (at >= n) break;
        copy_piece(input + at, p.input + row * n + at);
        if (p.added) copy_piece(reinterpret_cast<G*>(input + n) + at, p.added + row * n + at);
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
    weights[n + i] = b[0];
  }
  meeting.clear();
  __syncthreads();

  for (int turn = 0, slot = 0; row < p.rows; row += stride) {
    fetch(row + (kStages - 1) * stride, slot == 0 ? kStages - 1 : slot - 1);
    __pipeline_wait_prior(kStages - 1);
    const auto* const input = reinterpret_cast<const S*>(stage(slot));
    float x[K][kPiece], total = 0, nothing = 0;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      load_piece<S, float, kPiece>(input + at, x[c]);
      if (p.added) {
        float added[kPiece];
        load_piece<G, float, kPiece>(reinterpret_cast<const G*>(input + n) + at, added);
#pragma unroll
        for (int k = 0; k < kPiece; ++k) x[c][k] = convert<float>(convert<S>(x[c][k] + added[k]));
        store_piece<S, float, kPiece>(p.sum + row * n + at, x[c]);
      }
#pragma unroll
      for (int k = 0; k < kPiece; ++k) total += x[c][k];
    }
    float mean = 0;
    if (p.means) {
      sum_over_row(total, nothing, meeting, turn++);
      mean = total / static_cast<float>(n);
    }
    float squares = 0;
#pragma unroll
    for (int c = 0; c < K; ++c) {
      if (c * step + first >= n) break;
#pragma unroll
      for (int k = 0; k < kPiece; ++k) squares += (x[c][k] - mean) * (x[c][k] - mean);
    }
    sum_over_row(squares, nothing, meeting, turn++);
    const float rstd = 1.0f / sqrtf(squares / static_cast<float>(n) + p.eps);
    if (threadIdx.x == 0) {
      if (p.means) p.means[row] = mean;
      p.rstds[row] = rstd;
    }
#pragma unroll
    for (int c = 0; c < K; ++c) {
      const int at = c * step + first;
      if (at >= n) break;
      float w[kPiece], b[kPiece];
      load_piece<float, float, kPiece>(weights + at, w);
      load_piece<float, float, kPiece>(weights + n + at, b);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) x[c][k] = (x[c][k] - mean) * rstd * w[k] + b[k];
      store_piece<G, float, kPiece>(p.out + row * n + at, x[c]);
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
}

template <class S, class G>
bool launch_stream(const Launch& launch, const NormRows& g) {
  const int n = static_cast<int>(g.n);
  RowStreamShape shape;
  const int row_bytes = bytes_of_row<S, G>(n, 1, g.added.defined() ? 1 : 0);
  if (!shape.choose(launch, g.rows, n, row_bytes, 2, kMostThreads, kMostThreads, 2)) return false;
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.data() : nullptr; };
  const Rows<S, G> p{static_cast<const S*>(g.input.data()),
                     static_cast<const G*>(pointer(g.added)),
                     static_cast<S*>(pointer(g.sum)),
                     static_cast<G*>(g.out.data()),
                     Elements(g.weight),
                     Elements(g.bias),
                     g.mean.defined() ? g.mean.data_as<float>() : nullptr,
                     g.rstd.data_as<float>(),
                     static_cast<float>(g.eps),
                     g.rows};
  shape.visit_pieces([&]<int K>() {
    shape.run(launch, norm_stream<S, G, K>, p, n);
  });
  return true;
}

}  // namespace

bool stream_norm(const Launch& launch, const NormRows& g) {
  // Longer rows are a block's, and without sums to keep the plain kernels have more of them in flight.
  if (g.n % kPiece != 0 || g.n == 0 || g.n > kLongestWarpRow || g.rows == 0) return false;
  const DType wide = g.input.dtype(), narrow = g.out.dtype();
  for (const Tensor* t : {&g.input, &g.sum, &g.added, &g.out}) {
    if (!t->defined()) continue;
    if (!is_aligned(t->data())) return false;
    if (t->dtype() != (t == &g.added || t == &g.out ? narrow : wide)) return false;
  }
  if (g.rstd.dtype() != DType::Float32) return false;
  return visit_row_dtypes(wide, narrow,
                          [&]<class S, class G>() { return launch_stream<S, G>(launch, g); });
}

}  // namespace vt::cuda
