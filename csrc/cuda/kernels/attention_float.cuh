// Attention of float32 on tensor cores, in products split into TF32 (tf32_split.cuh): what forward
// and backward share. Heads up to 128 wide, rows aligned to 16 bytes. A warp owns 16 rows (queries,
// or keys), a block up to 8 warps, and walks over rows of the other kind, 16 at a time, which come
// through shared memory in two stages.
//
// An operand lies there in panels of 32 columns. A panel's row has 128 bytes, whose 16-byte pieces
// are exchanged by the row's number so that both ways of reading it meet no bank conflict: a lane
// reads four columns of row g, which are its share of two products (`across`), or of rows 2t and
// 2t + 1, which are its share of four (`along`). A product's columns may be taken in any order, and
// so may a result's: lane t has columns 8t … 8t + 7 of a panel's.
#pragma once

#include "cuda/kernels/attention.cuh"
#include "cuda/kernels/tf32_split.cuh"

namespace vt::cuda::attention {

inline constexpr int kPanel = 32;      // columns
inline constexpr int kPanelRow = 128;  // bytes
inline constexpr int kMostWarps = 8;   // of a block
inline constexpr int kRowsOfWarp = 16;
inline constexpr float kLog2OfE = 1.4426950408889634f;
inline constexpr float kLogOf2 = 0.6931471805599453f;

/// Rows of a stage.
template <int N>
inline constexpr int kStageRows = N == 4 ? 32 : 64;
template <int N>
inline constexpr int kOperandBytes = N * kStageRows<N> * kPanelRow;

__device__ inline uint32_t shared_place(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline float4 load_four(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// What a row's number exchanges the pieces by.
__device__ inline int exchange_of(int row) { return (row & 6) ^ (row & 1) << 2; }

/// Starts copying rows [first, first + count) of a head into panels of `room` rows: zeros beyond
/// its `rows` and `width`. By all threads of the block.
template <int N>
__device__ inline void start_panels(uint32_t to, int room, const float* from, int64_t stride,
                                    int first, int count, int rows, int width) {
  constexpr int kPieces = 8 * N;
  for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
    const int r = i / kPieces, c = i % kPieces, piece = c % 8;
    const bool there = first + r < rows && c * 4 < width;
    const uint32_t place = to + (c / 8 * room + r) * kPanelRow + ((piece ^ exchange_of(r)) << 4);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place),
                 "l"(there ? from + (first + r) * stride + c * 4 : from), "r"(there ? 16 : 0)
                 : "memory");
  }
}
__device__ inline void commit_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_stage() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8-column steps of the right operand from row `row` of a panel: 8 rows, transposed.
__device__ inline void read_across(SplitPart<2> (&b)[4], uint32_t panel, int row) {
  const int lane = threadIdx.x % kWarp, r = row + lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = load_four(panel + r * kPanelRow + (((half * 4 + t) ^ exchange_of(r)) << 4));
    b[2 * half].set(0, v.x);
    b[2 * half].set(1, v.y);
    b[2 * half + 1].set(0, v.z);
    b[2 * half + 1].set(1, v.w);
  }
}
/// The right operand of 8 rows from `row` and of the panel's 32 columns, as four of 8 columns.
__device__ inline void read_along(SplitPart<2> (&b)[4], uint32_t panel, int row) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, r = row + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 v = load_four(panel + (r + i) * kPanelRow + ((g ^ exchange_of(r + i)) << 4));
    b[0].set(i, v.x);
    b[1].set(i, v.y);
    b[2].set(i, v.z);
    b[3].set(i, v.w);
  }
}

/// A warp's 16 rows, this lane's share of a panel: columns 4t … of rows g and g + 8, then 16 + 4t
/// ….
struct LeftRows {
  float4 value[2][2];

  __device__ void split(SplitPart<4> (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[2 * half].set(r, value[half][r].x);
        a[2 * half].set(r + 2, value[half][r].y);
        a[2 * half + 1].set(r, value[half][r].z);
        a[2 * half + 1].set(r + 2, value[half][r].w);
      }
    }
  }
};

/// The left operand of a warp: kept in registers, or read again at each use.
template <int N, bool kKept>
struct LeftOperand {
  const float* from;  // of the lane's row g, piece t
  int64_t stride;
  int there[2];  // whether rows g and g + 8 exist
  int width;     // columns from the lane's first on
  LeftRows kept[kKept ? N : 1];

  __device__ LeftOperand(const float* head, int64_t row_stride, int first, int rows, int columns) {
    const int lane = threadIdx.x % kWarp, r = first + lane / 4, c = lane % 4 * 4;
    from = head + r * row_stride + c;
    stride = row_stride;
    there[0] = r < rows;
    there[1] = r + 8 < rows;
    width = columns - c;
    if constexpr (kKept) {
#pragma unroll
      for (int panel = 0; panel < N; ++panel) read(kept[panel], panel);
    }
  }
  __device__ void read(LeftRows& rows, int panel) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int c = panel * kPanel + half * 16;
        rows.value[half][r] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (there[r] && c < width)
          rows.value[half][r] = *reinterpret_cast<const float4*>(from + r * 8 * stride + c);
      }
    }
  }
  __device__ void split(SplitPart<4> (&a)[4], int panel) const {
    if constexpr (kKept) {
      kept[panel].split(a);
    } else {
      LeftRows rows;
      read(rows, panel);
      rows.split(a);
    }
  }
};

/// score[n] = the warp's 16 rows times rows [row + 8 n, row + 8 n + 8) of the right operand.
template <int N, bool kKept>
__device__ inline void dot_sixteen(float (&score)[2][4], const LeftOperand<N, kKept>& left,
                                   uint32_t right, int row) {
  // Rows that are read again need no registers of their own for every panel.
#pragma unroll(kKept ? N : 1)
  for (int panel = 0; panel < N; ++panel) {
    SplitPart<4> a[4];
    left.split(a, panel);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      SplitPart<2> b[4];
      read_across(b, right + panel * kStageRows<N> * kPanelRow, row + 8 * n);
      float c[4];
      multiply_split(c, a, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = panel == 0 ? c[i] : score[n][i] + c[i];
    }
  }
}

/// Scores of 16 rows and 16 columns as the left operand of a product over the columns.
__device__ inline void split_scores(SplitPart<4> (&a)[2], const float (&score)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    a[n].set(0, score[n][0]);
    a[n].set(1, score[n][2]);
    a[n].set(2, score[n][1]);
    a[n].set(3, score[n][3]);
  }
}

/// c[j] = scores times rows [row, row + 16) of a panel.
__device__ inline void weigh_sixteen(float (&c)[4][4], const SplitPart<4> (&a)[2], uint32_t panel,
                                     int row) {
  SplitPart<2> first[4], second[4];
  read_along(first, panel, row);
  read_along(second, panel, row + 8);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const SplitPart<2> b[2] = {first[j], second[j]};
    multiply_split(c[j], a, b);
  }
}

/// sum += scores times rows [row, row + 16) of the right operand.
template <int N>
__device__ inline void add_sixteen(float (&sum)[N][4][4], const float (&score)[2][4],
                                   uint32_t right, int row) {
  SplitPart<4> a[2];
  split_scores(a, score);
#pragma unroll
  for (int panel = 0; panel < N; ++panel) {
    float c[4][4];
    weigh_sixteen(c, a, right + panel * kStageRows<N> * kPanelRow, row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[panel][j][i] += c[j][i];
    }
  }
}

template <int N>
__device__ inline void clear_sums(float (&sum)[N][4][4]) {
#pragma unroll
  for (int panel = 0; panel < N; ++panel) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[panel][j][i] = 0.f;
    }
  }
}

/// Writes the warp's 16 rows from `first`, times a factor for rows g and g + 8.
template <int N>
__device__ inline void write_sums(float* head, int64_t stride, int first, int rows, int width,
                                  const float (&sum)[N][4][4], float factor, float other) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + lane / 4 + 8 * r;
    if (row >= rows) continue;
    const float by = r == 0 ? factor : other;
#pragma unroll
    for (int panel = 0; panel < N; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = panel * kPanel + lane % 4 * 8 + half * 4, i = 2 * r + half;
        if (c >= width) continue;
        *reinterpret_cast<float4*>(head + row * stride + c) =
            make_float4(sum[panel][0][i] * by, sum[panel][1][i] * by, sum[panel][2][i] * by,
                        sum[panel][3][i] * by);
      }
    }
  }
}

/// The largest (or the sum) over the 4 lanes that share a row.
template <class Op>
__device__ inline float over_quad(float value, const Op& op) {
  value = op(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return op(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ inline float two_to(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The scaled score of one query and key, to the base 2; -inf where the key is not to be seen.
/// Plain: there is neither a mask nor dropout.
template <bool kPlain>
__device__ inline float checked_score(const Problem<float>& p, float dot, float factor, int64_t b,
                                      int64_t h, int q, int k) {
  if constexpr (kPlain) {
    const bool seen = q < p.queries && k < p.keys && !(p.causal && k > q);
    return seen ? dot * factor : minus_infinity<float>();
  } else {
    return masked_score(p, dot, b, h, q, k) * kLog2OfE;
  }
}

/// Whether scores of 16 queries and 16 keys need no mask of any kind.
__device__ inline bool all_seen(const Problem<float>& p, int q, int k) {
  return !p.mask.data && q + 16 <= p.queries && k + 16 <= p.keys && (!p.causal || k + 15 <= q);
}

/// How `rows` rows are spread over blocks: warps a block.
struct WarpRows {
  int blocks, warps;
  explicit WarpRows(int64_t rows) {
    const int strips = static_cast<int>(ceil_div<int64_t>(rows, kRowsOfWarp));
    blocks = ceil_div(strips, kMostWarps);
    warps = ceil_div(strips, std::max(blocks, 1));
  }
};

/// Whether rows can be read in 16-byte pieces.
inline bool in_fours(const Operand<float>& t) {
  return t.column == 1 && is_aligned(t.data) && t.row % 4 == 0 && t.head % 4 == 0 &&
         t.batch % 4 == 0;
}

/// Calls f.template operator()<N, kPlain>(), N panels of columns, where the kernels take these
/// sizes.
template <class F>
bool visit_panels(const Tensor& query, const Tensor& key, const Tensor& value, bool plain, F&& f) {
  const int64_t width = query.sizes()[3], value_width = value.sizes()[3];
  const int64_t most = std::max(width, value_width),
                rows = std::max(query.sizes()[2], key.sizes()[2]);
  if (query.dtype() != DType::Float32 || width <= 0 || value_width <= 0 || width % 4 != 0 ||
      value_width % 4 != 0 || most > 4 * kPanel || key.sizes()[2] <= 0 ||
      rows >= (int64_t{1} << 30))
    return false;
  if (most <= kPanel)
    return plain ? f.template operator()<1, true>() : f.template operator()<1, false>();
  if (most <= 2 * kPanel)
    return plain ? f.template operator()<2, true>() : f.template operator()<2, false>();
  return plain ? f.template operator()<4, true>() : f.template operator()<4, false>();
}

}  // namespace vt::cuda::attention
