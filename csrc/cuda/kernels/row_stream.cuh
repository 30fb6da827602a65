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

/// Where a row's sums over its threads meet. One barrier a sum is enough: places alternate.
struct RowMeeting {
  float2 place[2][16];

  /// By all threads of a block, before a barrier.
  __device__ void clear() {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    if (thread < 32) place[thread / 16][thread % 16] = {0, 0};
  }
};

/// Adds up two values over the threads of a row, in a fixed order; all of them get both.
__device__ inline void sum_over_row(float& a, float& b, RowMeeting& meeting, int turn) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, mask);
    b += __shfl_xor_sync(0xffffffffu, b, mask);
  }
  if (blockDim.x == kWarp) return;
  float2* const place = meeting.place[turn & 1];
  if (threadIdx.x % kWarp == 0) place[threadIdx.x / kWarp] = {a, b};
  __syncthreads();
  a = b = 0;
#pragma unroll
  for (int w = 0; w < 16; w += 4) {
    if (w * kWarp >= blockDim.x) break;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      a += place[w + k].x;
      b += place[w + k].y;
    }
  }
}

/// How rows are spread over threads; `pieces` is 2, 3, 4 or 6.
struct RowStreamShape {
  static constexpr int kReserve = 1024;  // bytes of shared memory for the kernel's own and the system
  dim3 block;
  int pieces = 0, shared_bytes = 0;
  int64_t blocks = 0;

  /// `most` threads a block (and `most_long` where a thread has 6 pieces), `per_sm` blocks of as many
  /// threads a multiprocessor; `kept` arrays of n floats in shared memory. False where two rows do
  /// not fit.
  bool choose(const Launch& launch, int64_t rows, int n, int row_bytes, int kept, int most,
              int most_long, int per_sm) {
    const int multiprocessors = launch.properties().multiprocessors;
    if (n <= kLongestWarpRow) {
      pieces = n <= 256 ? 2 : n <= 384 ? 3 : n <= 512 ? 4 : 6;
      if (pieces == 6) most = most_long;
      // As many rows as a multiprocessor gets, where those are few.
      const int64_t warps = std::min<int64_t>(ceil_div<int64_t>(rows, multiprocessors), most / kWarp);
      block = dim3(kWarp, static_cast<unsigned>(warps));
    } else {
      pieces = 4;
      const int threads = ceil_div(n, pieces * kPiece * kWarp) * kWarp;
      if (threads > most) return false;
      block = dim3(static_cast<unsigned>(threads), 1);
    }
    const int threads = static_cast<int>(block.x * block.y);
    const int limit = launch.properties().shared_memory_per_block;
    shared_bytes = kept * n * static_cast<int>(sizeof(float)) +
                   kStages * static_cast<int>(block.y) * row_bytes;
    if (shared_bytes + kReserve > limit) return false;
    const int resident =
        std::max(1, std::min(per_sm * most / threads, limit / (shared_bytes + kReserve)));
    blocks = std::min<int64_t>(ceil_div<int64_t>(rows, block.y),
                               int64_t{multiprocessors} * resident);
    return true;
  }

  template <class... Params, class... Args>
  void run(const Launch& launch, void (*kernel)(Params...), const Args&... args) const {
    allow_shared_memory(kernel, shared_bytes + kReserve);
    launch(kernel, dim3(static_cast<unsigned>(blocks)), block, static_cast<size_t>(shared_bytes),
           args...);
  }

  /// f.operator()<K>() with K = pieces.
  template <class F>
  void visit_pieces(const F& f) const {
    if (pieces == 2) f.template operator()<2>();
    if (pieces == 3) f.template operator()<3>();
    if (pieces == 4) f.template operator()<4>();
    if (pieces == 6) f.template operator()<6>();
  }
};

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
