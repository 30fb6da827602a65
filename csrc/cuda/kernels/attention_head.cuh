// Attention of a head that a block holds in shared memory as a whole: what forward and backward
// share. Up to 128 rows of 64 or 32 16-bit floats, a warp for each 16 of them; every sum has one owner.
//
// An operand is dense rows in shared memory, a row's 16-byte pieces exchanged by the number of the 128
// bytes that it is in, so that neither ldmatrix nor rows of pieces meet bank conflicts. Rows beyond
// the sequence are zeros.
#pragma once

#include "cuda/kernels/attention_mma.cuh"

namespace vt::cuda::attention {

inline constexpr int kHeadWidth = 64;  // where nothing else is said
template <int kWidth>
inline constexpr int pieces_of = kWidth / 8;  // of 16 bytes, in a row
inline constexpr int kPieces = pieces_of<kHeadWidth>;
inline constexpr float kLog2E = 1.4426950408889634f;

template <int kWidth>
inline constexpr uint32_t tile_bytes = 16 * kWidth * 2;  // 16 rows
inline constexpr uint32_t kTileBytes = tile_bytes<kHeadWidth>;

/// Operands of all heads. Rows are dense and aligned to 16 bytes.
template <class S>
struct HeadProblem {
  Operand<S> query, key, value;
  int heads, length;
  bool causal;
  float scale;
};

/// What a lane adds to the address of a multiple of 16 rows; all pieces of a row follow by exclusive
/// or, since an operand starts at a multiple of 128 bytes.
template <int kWidth = kHeadWidth>
struct Lanes {
  static_assert(kWidth == 32 || kWidth == 64);
  static constexpr int kPieces = pieces_of<kWidth>;
  static constexpr int kRowBytes = kWidth * 2;
  static constexpr int kRowsAtOnce = kWarp / kPieces;  // a lane for each piece
  static constexpr int kAccesses = 16 / kRowsAtOnce;   // to 16 rows

  uint32_t left;   // ldmatrix of a left operand, and transposed of a right one
  uint32_t right;  // ldmatrix of a right operand
  uint32_t piece;  // kRowsAtOnce rows in pieces of 16 bytes
  uint32_t pair;   // two adjacent sums of a product

  __device__ Lanes() {
    const uint32_t lane = threadIdx.x % kWarp, matrix = lane / 8, line = lane % 8;
    left = (matrix % 2 * 8 + line) * kRowBytes + ((matrix / 2 ^ exchange(line)) << 4);
    right = (matrix / 2 * 8 + line) * kRowBytes + ((matrix % 2 ^ exchange(line)) << 4);
    const uint32_t row = lane / kPieces;
    piece = row * kRowBytes + ((lane % kPieces ^ exchange(row)) << 4);
    pair = lane / 4 * kRowBytes + (exchange(lane / 4) << 4) + lane % 4 * 4;
  }
  /// The lane's piece, lane % kPieces, of row kRowsAtOnce i + lane / kPieces.
  __device__ uint32_t piece_of(uint32_t rows, int i) const {
    return (rows + piece + i * kRowsAtOnce * kRowBytes) ^ (exchange(i * kRowsAtOnce) << 4);
  }

 private:
  /// By what a row's pieces are exchanged.
  __device__ static constexpr uint32_t exchange(uint32_t row) {
    return row * kRowBytes / 128 % kPieces;
  }
};

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline uint4 load_piece(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ inline void store_pair(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

/// Starts copying a warp's 16 rows from `first`, those below `length`; zeros in the others. `rows` is
/// where the first lies in shared memory.
template <class S, int kWidth>
__device__ inline void start_rows(uint32_t rows, const Lanes<kWidth>& at, const S* from,
                                  int64_t stride, int first, int length) {
  constexpr int kStep = Lanes<kWidth>::kRowsAtOnce;
  const int lane = threadIdx.x % kWarp, row = first + lane / at.kPieces;
  const S* source = from + (row < length ? row : 0) * stride + lane % at.kPieces * 8;
#pragma unroll
  for (int i = 0; i < at.kAccesses; ++i) {
    const bool there = row + kStep * i < length;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at.piece_of(rows, i)),
                 "l"(there ? source + kStep * i * stride : from), "r"(there ? 16 : 0)
                 : "memory");
  }
}
/// Writes a warp's 16 rows from `first`, those below `length`.
template <class S, int kWidth>
__device__ inline void write_rows(S* to, int64_t stride, uint32_t rows, const Lanes<kWidth>& at,
                                  int first, int length) {
  constexpr int kStep = Lanes<kWidth>::kRowsAtOnce;
  const int lane = threadIdx.x % kWarp, row = first + lane / at.kPieces;
  S* target = to + row * stride + lane % at.kPieces * 8;
#pragma unroll
  for (int i = 0; i < at.kAccesses; ++i) {
    if (row + kStep * i < length)
      *reinterpret_cast<uint4*>(target + kStep * i * stride) = load_piece(at.piece_of(rows, i));
  }
}
/// Puts 16 rows of sums, scaled, into shared memory.
template <class S, int kWidth>
__device__ inline void put_rows(uint32_t rows, const Lanes<kWidth>& at,
                                const float (&sums)[pieces_of<kWidth>][4], float scale) {
#pragma unroll
  for (int n = 0; n < pieces_of<kWidth>; ++n) {
    const uint32_t to = (rows + at.pair) ^ (n << 4);
    store_pair(to, pack<S>(sums[n][0] * scale, sums[n][1] * scale));
    store_pair(to + 8 * at.kRowBytes, pack<S>(sums[n][2] * scale, sums[n][3] * scale));
  }
}

template <int kPending = 0>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// 16 rows as the left operand, 16 columns at a time.
template <int kWidth>
__device__ inline void load_left(uint32_t (&a)[kWidth / 16][4], uint32_t rows,
                                 const Lanes<kWidth>& at) {
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) load_matrices(a[k], (rows + at.left) ^ (k << 5));
}

/// c = a b.
template <class S>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
  }
}

/// c = the left operand times 16 rows, transposed.
template <class S, int kWidth>
__device__ inline void dot_16(float (&c)[2][4], const uint32_t (&a)[kWidth / 16][4], uint32_t rows,
                              const Lanes<kWidth>& at) {
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, (rows + at.right) ^ (k << 5));
    if (k == 0) {
      multiply<S>(c[0], a[k], b[0], b[1]);
      multiply<S>(c[1], a[k], b[2], b[3]);
    } else {
      multiply_add<S>(c[0], a[k], b[0], b[1]);
      multiply_add<S>(c[1], a[k], b[2], b[3]);
    }
  }
}

/// sum += a (16 x 16) times 16 rows.
template <class S, int kWidth>
__device__ inline void add_16(float (&sum)[pieces_of<kWidth>][4], const uint32_t (&a)[4],
                              uint32_t rows, const Lanes<kWidth>& at) {
#pragma unroll
  for (int n = 0; n < pieces_of<kWidth>; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, (rows + at.left) ^ (n << 4));
    multiply_add<S>(sum[n], a, b[0], b[1]);
    multiply_add<S>(sum[n + 1], a, b[2], b[3]);
  }
}

/// 16 x 16 values, as products leave them, as the left operand of another.
template <class S>
__device__ inline void pack_left(uint32_t (&a)[4], const float (&c)[2][4]) {
  a[0] = pack<S>(c[0][0], c[0][1]);
  a[1] = pack<S>(c[0][2], c[0][3]);
  a[2] = pack<S>(c[1][0], c[1][1]);
  a[3] = pack<S>(c[1][2], c[1][3]);
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vt::cuda::attention
