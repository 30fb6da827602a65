// Tiles of a float32 product (matmul_float.cu) in shared memory: 128 rows of the left operand, 64 or
// 128 columns of the right one, 32 terms. They lie in rows of 128 bytes whose 16-byte pieces are
// exchanged.
#pragma once

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tf32_split.cuh"

namespace vt::cuda {

inline constexpr int kTerms = 32, kRowBytes = 128, kRows = 128;
inline constexpr int kLeft = kRows * kRowBytes;

template <bool kWhole>
__device__ inline float4 load_part(const float* from, int count) {
  if (kWhole || count >= 4) return __ldg(reinterpret_cast<const float4*>(from));
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (count > 0) v.x = from[0];
  if (count > 1) v.y = from[1];
  if (count > 2) v.z = from[2];
  return v;
}
__device__ inline void store_four(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ inline void store_two(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ inline float load_one(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

/// The right operand's tiles, 32 numbers of each a thread (16 of 64 columns), split and put into two.
/// Adjacent terms: column thread / 8 + 16 i, terms thread % 8 * 4 …. Else blocks of 4 columns and 4
/// terms, turned.
template <bool kAdjacentTerms, int kColumns>
struct RightTiles {
  static constexpr int kBytes = kColumns * kRowBytes;  // of either part
  static constexpr int kBlocks = kColumns / 64;        // of 4 pieces
  const float* from;  // of the thread's first piece
  int64_t stride;
  int columns, terms;  // left, from there on
  uint32_t place[kAdjacentTerms ? 1 : 4];
  float4 piece[2][4 * kBlocks];

  __device__ RightTiles(const float* data, int64_t row_stride, int first, int extent, int term,
                        int last, int thread)
      : stride(row_stride) {
    if constexpr (kAdjacentTerms) {
      const int row = thread / 8, inner = thread % 8;
      columns = extent - first - row;
      terms = last - term - inner * 4;
      from = data + (first + row) * stride + term + inner * 4;
      place[0] = row * kRowBytes + ((inner ^ row % 8) << 4);
    } else {
      // So that both 8 lanes that store and those that load are next to each other.
      const int column = (thread % 2 + thread / 8 % 2 * 2 + thread / 32 * 4) * 4;
      const int piece_of_terms = thread / 2 % 4 + thread / 16 % 2 * 4;
      columns = extent - first - column;
      terms = last - term - piece_of_terms * 4;
      from = data + (term + piece_of_terms * 4) * stride + first + column;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        place[i] = (column + i) * kRowBytes + ((piece_of_terms ^ (column + i) % 8) << 4);
    }
  }
  /// Loads the next tile. Whole: all of it is there.
  template <bool kWhole>
  __device__ void load_into(float4 (&to)[4 * kBlocks]) {
    if constexpr (kAdjacentTerms) {
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i)
        to[i] = load_part<kWhole>(from + i * 16 * stride, columns > 16 * i ? terms : 0);
      from += kTerms;
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i)
        to[i] = load_part<kWhole>(from + i % 4 * stride + i / 4 * 64,
                                  terms > i % 4 ? columns - i / 4 * 64 : 0);
      from += kTerms * stride;
    }
    terms -= kTerms;
  }
  template <int kBuffer>
  __device__ void load(bool whole) {
    if (whole)
      load_into<true>(piece[kBuffer]);
    else
      load_into<false>(piece[kBuffer]);
  }
  __device__ static void put(uint32_t high, uint32_t low, float x, float y, float z, float w) {
    SplitPart<4> s;
    s.set(0, x);
    s.set(1, y);
    s.set(2, z);
    s.set(3, w);
    store_four(high, s.high);
    store_four(low, s.low);
  }
  template <int kBuffer>
  __device__ void store(uint32_t high) const {
    const uint32_t low = high + kBytes;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float4* v = piece[kBuffer] + block * 4;
      if constexpr (kAdjacentTerms) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t to = place[0] + (block * 4 + i) * 16 * kRowBytes;
          put(high + to, low + to, v[i].x, v[i].y, v[i].z, v[i].w);
        }
      } else {
        const uint32_t to = block * 64 * kRowBytes;
        put(high + to + place[0], low + to + place[0], v[0].x, v[1].x, v[2].x, v[3].x);
        put(high + to + place[1], low + to + place[1], v[0].y, v[1].y, v[2].y, v[3].y);
        put(high + to + place[2], low + to + place[2], v[0].z, v[1].z, v[2].z, v[3].z);
        put(high + to + place[3], low + to + place[3], v[0].w, v[1].w, v[2].w, v[3].w);
      }
    }
  }
};

/// The left operand's tiles as they are.
template <bool kAdjacentTerms>
struct LeftTiles {
  static constexpr int kStep = kAdjacentTerms ? 16 : 4;  // rows of memory between a thread's pieces
  const float* from;                                     // of the thread's first piece
  int64_t stride;
  int rows, terms;  // left, from there on
  uint32_t place;

  __device__ LeftTiles(const float* data, int64_t row_stride, int first, int extent, int term,
                       int last, int thread)
      : stride(row_stride) {
    if constexpr (kAdjacentTerms) {
      const int row = thread / 8, inner = thread % 8;
      rows = extent - first - row;
      terms = last - term - inner * 4;
      from = data + (first + row) * stride + term + inner * 4;
      place = row * kRowBytes + ((inner ^ row % 8) << 4);
    } else {
      const int row = thread / 32, inner = thread % 32;
      rows = extent - first - inner * 4;
      terms = last - term - row;
      from = data + (term + row) * stride + first + inner * 4;
      place = (inner / 8 * kTerms + row) * kRowBytes + ((inner % 8 ^ (row % 4 * 2)) << 4);
    }
  }
  __device__ void start(uint32_t to, const float* somewhere) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int left = kAdjacentTerms      ? (rows > i * kStep ? terms : 0)
                       : terms > i * kStep ? rows
                                           : 0;
      const int bytes = left >= 4 ? 16 : left > 0 ? left * 4 : 0;
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + place + i * kStep * kRowBytes),
          "l"(bytes > 0 ? from + i * kStep * stride : somewhere), "r"(bytes)
          : "memory");
    }
    from += kAdjacentTerms ? kTerms : kTerms * stride;
    terms -= kTerms;
  }
};

/// Where in the left operand's tile a lane's share of a warp's 16 rows from `row` begins.
template <bool kAdjacentTerms>
__device__ inline uint32_t left_place(int row) {
  const int lane = threadIdx.x % kWarp, r = row + lane / 4, t = lane % 4;
  return kAdjacentTerms
             ? r * kRowBytes + (r % 8 << 4) + t * 4
             : (r / 32 * kTerms + t) * kRowBytes + ((r % 32 / 4 ^ t * 2) << 4) + r % 4 * 4;
}
/// The share: rows g and g + 8 of column t, then of t + 4, of four products. Pieces of a row of
/// memory follow from one another by an exclusive or.
template <bool kAdjacentTerms>
__device__ inline void read_left(float (&x)[4][4], uint32_t place) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = 2 * k + i / 2;  // of 4 columns
      x[k][i] = load_one(kAdjacentTerms ? (place ^ half << 4) + i % 2 * 8 * kRowBytes
                                        : (place ^ i % 2 << 5) + half * 4 * kRowBytes);
    }
  }
}

}  // namespace vt::cuda
