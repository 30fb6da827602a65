#include "cuda/kernels/matmul_padded.cuh"

#include <algorithm>
#include <optional>

#include "core/tensor.h"
#include "cuda/kernels/element.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int64_t kPiece = 8;  // elements of 16 bytes
constexpr int kThreads = 256;
// Multiplications from which a fast kernel saves more than copies cost.
constexpr int64_t kWorth = int64_t{1} << 27;

int64_t padded(int64_t n) { return ceil_div(n, kPiece) * kPiece; }
bool is_piecewise(const void* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % kPiece == 0;
}

struct Piece {
  uint4 bits;
  __device__ uint16_t* elements() { return reinterpret_cast<uint16_t*>(&bits); }
};

/// to (to_rows x to_columns, dense, columns a multiple of 8) = from (rows x columns) and zeros.
template <class Index>
__global__ void __launch_bounds__(kThreads)
    pad(Piece* to, Index to_rows, Index to_columns, const uint16_t* from, Index rows, Index columns,
        Index ld) {
  const Index across = to_columns / kPiece;
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= to_rows * across) return;
  const Index row = i / across, column = (i - row * across) * kPiece;
  Piece piece{};
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    if (row < rows && column + k < columns) piece.elements()[k] = from[row * ld + column + k];
  }
  to[i] = piece;
}

/// to (rows x columns, dense, 16-byte aligned) = the columns of `from` there are.
template <class Index>
__global__ void __launch_bounds__(kThreads)
    unpad_dense(uint16_t* to, Index rows, Index columns, const uint16_t* from, Index ld) {
  const Index first = (Index{blockIdx.x} * kThreads + threadIdx.x) * kPiece, count = rows * columns;
  if (first >= count) return;
  Index row = first / columns, column = first - row * columns;
  Piece piece{};
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    if (first + k < count) piece.elements()[k] = from[row * ld + column];
    if (++column == columns) column = 0, ++row;
  }
  if (first + kPiece <= count) {
    *reinterpret_cast<Piece*>(to + first) = piece;
  } else {
    for (Index k = 0; first + k < count; ++k) to[first + k] = piece.elements()[k];
  }
}

/// The same for rows that lie apart.
template <class Index>
__global__ void __launch_bounds__(kThreads)
    unpad(uint16_t* to, Index rows, Index columns, Index to_ld, const uint16_t* from, Index ld) {
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows * columns) return;
  const Index row = i / columns, column = i - row * columns;
  to[row * to_ld + column] = from[row * ld + column];
}

/// Calls f with an index type that holds `count`, and the blocks that many threads make.
template <class F>
void by_index(int64_t threads, int64_t count, F&& f) {
  const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  if (count < int64_t{1} << 31)
    f(uint32_t{}, blocks);
  else
    f(uint64_t{}, blocks);
}

/// An operand as the product reads it, and its copy if it needed one.
class Padded {
 public:
  /// rows x columns as the product sees them, which may be more than there are.
  Padded(const Launch& launch, const GemmOperand& o, int64_t rows, int64_t columns,
         int64_t all_rows, int64_t all_columns)
      : operand_(o) {
    const bool t = o.transposed;
    if (is_piecewise(o.data, o.ld) && rows == all_rows && columns == all_columns) return;
    const int64_t from_rows = t ? columns : rows, from_columns = t ? rows : columns;
    const int64_t to_rows = t ? all_columns : all_rows, to_columns = padded(t ? all_rows : all_columns);
    copy_.emplace(static_cast<size_t>(to_rows * to_columns) * 2, launch);
    operand_.data = copy_->data();
    operand_.ld = to_columns;
    by_index(to_rows * to_columns / kPiece, std::max(to_rows * to_columns, from_rows * o.ld),
             [&]<class Index>(Index, dim3 blocks) {
               launch(pad<Index>, blocks, dim3(kThreads), 0, copy_->data<Piece>(),
                      static_cast<Index>(to_rows), static_cast<Index>(to_columns),
                      static_cast<const uint16_t*>(o.data), static_cast<Index>(from_rows),
                      static_cast<Index>(from_columns), static_cast<Index>(o.ld));
             });
  }
  const GemmOperand& operand() const { return operand_; }

 private:
  GemmOperand operand_;
  std::optional<Scratch> copy_;
};

}  // namespace

bool padded_product(const Launch& launch, const GemmProblem& p) {
  if (item_size(p.dtype) != 2 || p.batch != 1 || p.epilogue != GemmEpilogue::None) return false;
  const int64_t n = padded(p.n), k = padded(p.k);
  const bool result = n != p.n || !is_piecewise(p.c, p.ldc);
  if (!result && k == p.k && is_piecewise(p.a.data, p.a.ld) && is_piecewise(p.b.data, p.b.ld))
    return false;
  if (p.m * p.k * p.n < kWorth || (result && p.beta != 0)) return false;
  // The copies move each element once; the product must use them often enough.
  if (std::min({p.m, p.n, p.k}) < 16) return false;
  const Padded a(launch, p.a, p.m, p.k, p.m, k), b(launch, p.b, p.k, p.n, k, n);
  GemmProblem q = p;
  q.n = n;
  q.k = k;
  q.a = a.operand();
  q.b = b.operand();
  std::optional<Scratch> c, bias;
  if (result) {
    q.c = c.emplace(static_cast<size_t>(p.m * n) * 2, launch).data();
    q.ldc = n;
  }
  if (p.bias && n != p.n) {
    q.bias = bias.emplace(static_cast<size_t>(n) * 2, launch).data();
    launch(pad<uint32_t>, dim3(static_cast<unsigned>(ceil_div<int64_t>(n / kPiece, kThreads))),
           dim3(kThreads), 0, bias->data<Piece>(), 1u, static_cast<uint32_t>(n),
           static_cast<const uint16_t*>(p.bias), 1u, static_cast<uint32_t>(p.n),
           static_cast<uint32_t>(p.n));
  }
  if (!cublaslt_gemm(q, {launch.stream(), launch.device()})) return false;
  if (!result) return true;
  const bool dense = p.ldc == p.n && reinterpret_cast<uintptr_t>(p.c) % 16 == 0;
  const int64_t count = p.m * p.n;
  by_index(dense ? ceil_div(count, kPiece) : count, std::max(p.m * n, p.m * p.ldc),
           [&]<class Index>(Index, dim3 blocks) {
             auto* const to = static_cast<uint16_t*>(p.c);
             const auto* const from = c->data<const uint16_t>();
             const auto rows = static_cast<Index>(p.m), columns = static_cast<Index>(p.n);
             if (dense)
               launch(unpad_dense<Index>, blocks, dim3(kThreads), 0, to, rows, columns, from,
                      static_cast<Index>(n));
             else
               launch(unpad<Index>, blocks, dim3(kThreads), 0, to, rows, columns,
                      static_cast<Index>(p.ldc), from, static_cast<Index>(n));
           });
  return true;
}

}  // namespace vt::cuda
