// Rows streamed through shared memory: a fixed number of blocks walks over all rows, and every thread
// copies its own pieces of the row to come ahead of time and asynchronously, then reads back only
// what it copied itself. The memory is always busy, no barrier stands between a copy and its use, and
// registers hold one row alone. A row belongs to a warp (up to 768 elements) or to a block.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/kernels/elements.cuh"

namespace vt::cuda {

inline constexpr int kPiece = 4;   // elements of an access
inline constexpr int kLongestWarpRow = 768;
inline constexpr int kStages = 2;  // rows of a thread in shared memory

template <class S>
__device__ inline void copy_piece(S* shared, const S* global) {
  __pipeline_memcpy_async(shared, global, kPiece * sizeof(S));
}

/// Bytes of a row of `wide` rows of S and `narrow` rows of G beside each other in shared memory.
template <class S, class G>
__host__ __device__ constexpr int bytes_of_row(int n, int wide, int narrow) {
  const int bytes = n * (wide * static_cast<int>(sizeof(S)) + narrow * static_cast<int>(sizeof(G)));
  return (bytes + 15) / 16 * 16;
}

/// Where the sums of a row that several warps share meet. One barrier a sum is enough: places
/// alternate.
struct RowMeeting {
  float place[2][16][2];
};

/// Adds up N values over the threads of a row, in a fixed order; all of them get the sums.
template <bool kWarpRow, int N>
__device__ inline void sum_over_row(float (&values)[N], RowMeeting& meeting, int turn) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], mask);
  }
  if constexpr (!kWarpRow) {
    const int warps = blockDim.x / kWarp;
    auto* const place = meeting.place[turn & 1] + threadIdx.y * warps;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) place[threadIdx.x / kWarp][i] = values[i];
    }
    // The threads of this row alone; barrier 0 is the block's.
    asm volatile("barrier.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = 0;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += place[w][i];
    }
  }
}

/// How rows are spread over threads: by a warp each with 2, 3, 4 or 6 pieces a thread, or by several
/// warps with 4.
struct RowStreamShape {
  static constexpr int kReserve = 1024;  // bytes of shared memory for the kernel's own and the system
  dim3 block;
  int pieces = 0, shared_bytes = 0;
  int64_t blocks = 0;
  bool warp_row = false, whole = false;  // whole: a thread has all its pieces in every row

  /// `most` threads a block (and `most_long` where a thread has 6 pieces), `per_sm` blocks of as many
  /// threads a multiprocessor; `kept` arrays of n floats in shared memory. False where two rows do
  /// not fit.
  bool choose(const Launch& launch, int64_t rows, int n, int row_bytes, int kept, int most,
              int most_long, int per_sm) {
    warp_row = n <= kLongestWarpRow;
    pieces = !warp_row ? 4 : n <= 256 ? 2 : n <= 384 ? 3 : n <= 512 ? 4 : 6;
    const int across = warp_row ? kWarp : ceil_div(n, pieces * kPiece * kWarp) * kWarp;
    if (pieces == 6) most = most_long;
    if (across > most) return false;
    whole = n == across * pieces * kPiece;
    // As many rows as a multiprocessor gets, where those are few, and as fit.
    const int multiprocessors = launch.properties().multiprocessors;
    const int limit = launch.properties().shared_memory_per_block - kReserve -
                      kept * n * static_cast<int>(sizeof(float));
    const int64_t down =
        std::min<int64_t>({most / across, ceil_div<int64_t>(rows, multiprocessors),
                           limit / (kStages * row_bytes), warp_row ? kWarp : 15});
    if (down < 1) return false;
    block = dim3(static_cast<unsigned>(across), static_cast<unsigned>(down));
    shared_bytes = kept * n * static_cast<int>(sizeof(float)) +
                   kStages * static_cast<int>(down) * row_bytes;
    const int resident = std::max<int>(
        1, std::min<int>(per_sm, launch.properties().shared_memory_per_block /
                                     (shared_bytes + kReserve)));
    blocks = std::min<int64_t>(ceil_div<int64_t>(rows, down), int64_t{multiprocessors} * resident);
    return true;
  }

  template <class... Params, class... Args>
  void run(const Launch& launch, void (*kernel)(Params...), const Args&... args) const {
    // More than the kernel asks for, as its own memory counts too; with that at most the limit.
    allow_shared_memory(kernel, shared_bytes + kReserve - static_cast<int>(sizeof(RowMeeting)));
    launch(kernel, dim3(static_cast<unsigned>(blocks)), block, static_cast<size_t>(shared_bytes),
           args...);
  }

  /// f.operator()<pieces, warp_row, whole>().
  template <class F>
  void visit(const F& f) const {
    const auto with = [&]<int K, bool kWarpRow>() {
      whole ? f.template operator()<K, kWarpRow, true>() : f.template operator()<K, kWarpRow, false>();
    };
    if (!warp_row) return with.template operator()<4, false>();
    if (pieces == 2) with.template operator()<2, true>();
    if (pieces == 3) with.template operator()<3, true>();
    if (pieces == 4) with.template operator()<4, true>();
    if (pieces == 6) with.template operator()<6, true>();
  }
};

/// Which pieces of a row a thread has: those at first, first + step, ...
template <int K, bool kWarpRow, bool kWhole>
struct PiecesOfRow {
  int n, step, first;
  __device__ explicit PiecesOfRow(int length)
      : n(kWarpRow && kWhole ? K * kWarp * kPiece : length),
        step((kWarpRow ? kWarp : static_cast<int>(blockDim.x)) * kPiece),
        first(static_cast<int>(threadIdx.x) * kPiece) {}
  __device__ bool has(int c) const { return kWhole || c * step + first < n; }
};

/// Elements at a thread's piece c of a row whose first piece is at `row`; zeros where it has none.
template <class S, class Pieces>
__device__ inline void load_piece_of(const Pieces& pieces, int c, const S* row,
                                     float (&values)[kPiece]) {
  if (pieces.has(c)) {
    load_piece<S, float, kPiece>(row + c * pieces.step, values);
  } else {
#pragma unroll
    for (int k = 0; k < kPiece; ++k) values[k] = 0;
  }
}

/// Calls f with the storage types of rows and of what is beside them: the same, or a 16-bit float
/// beside float; false for others.
template <class F>
bool visit_row_dtypes(DType wide, DType narrow, const F& f) {
  if (wide == DType::Float32) {
    if (narrow == DType::BFloat16) return f.template operator()<float, __nv_bfloat16>();
    if (narrow == DType::Float16) return f.template operator()<float, __half>();
    if (narrow == DType::Float32) return f.template operator()<float, float>();
  }
  if (wide != narrow) return false;
  if (wide == DType::BFloat16) return f.template operator()<__nv_bfloat16, __nv_bfloat16>();
  if (wide == DType::Float16) return f.template operator()<__half, __half>();
  return false;
}

}  // namespace vt::cuda
