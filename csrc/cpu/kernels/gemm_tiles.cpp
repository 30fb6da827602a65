// C is computed in tiles of kTileRows x kPanel whose accumulators fill the register file over a
// stretch of k. B is first packed, once for all threads, into panels of kPanel columns, so that a
// step of k is one contiguous load; A is read where it lies if its rows or columns are dense, else
// packed the same way. The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", ACM TOMS 2008; packing one operand only pays here because training has
// tall, narrow products.
#include "cpu/kernels/gemm_tiles.h"

#include <algorithm>

#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kLanes = VectorOf<float>::lanes;
constexpr int64_t kPanel = kTilePanel;
constexpr int64_t kDonePanels = 4;  // complete columns of C are finished this many panels at a time
constexpr int64_t kDepth = 512;     // k of one pass: a panel of B is 64 KB
// What is packed at a time: at most 16 MB of either operand.
constexpr int64_t kMaxDepth = 4096, kMaxRows = 1024 / kTileRows * kTileRows, kMaxColumns = 1024;

using Lanes = Vector<float>;

/// Interleaves two vectors: lanes 0, 0', 1, 1', … of their first halves or their second ones.
template <bool kHigh, size_t... I>
inline Lanes zip(Lanes x, Lanes y, std::index_sequence<I...>) {
  constexpr int kStart = kHigh ? static_cast<int>(kLanes / 2) : 0;
  return __builtin_shufflevector(
      x, y, (kStart + static_cast<int>(I / 2) + (I % 2 ? static_cast<int>(kLanes) : 0))...);
}

/// out[k·step + j] = in[j·stride + k] for a square of kLanes: log2(kLanes) perfect shuffles.
inline void transpose_square(float* out, int64_t step, const float* in, int64_t stride) {
  constexpr std::make_index_sequence<kLanes> lanes;
  Lanes rows[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int64_t j = 0; j < kLanes; ++j) rows[j] = load(in + j * stride);
#pragma GCC unroll 4
  for (int64_t stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kLanes / 2; ++j) {
      next[2 * j] = zip<false>(rows[j], rows[j + kLanes / 2], lanes);
      next[2 * j + 1] = zip<true>(rows[j], rows[j + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes; ++j) rows[j] = next[j];
  }
#pragma GCC unroll 16
  for (int64_t k = 0; k < kLanes; ++k) store(out + k * step, rows[k]);
}

/// Packs `width` lines (columns of B, rows of A) of `depth` elements as out[k·kWidth + line]; the
/// lines that are missing become zeros.
template <int64_t kWidth>
void pack(float* out, const float* in, int64_t line_stride, int64_t k_stride, int64_t width,
          int64_t depth) {
  if (width < kWidth) std::fill(out, out + depth * kWidth, 0.0f);
  if (line_stride == 1) {
    if (width == kWidth) {
      for (int64_t k = 0; k < depth; ++k)
        std::memcpy(out + k * kWidth, in + k * k_stride, kWidth * sizeof(float));
    } else {
      for (int64_t k = 0; k < depth; ++k)
        std::copy(in + k * k_stride, in + k * k_stride + width, out + k * kWidth);
    }
    return;
  }
  int64_t first = 0;
  if (k_stride == 1) {
    for (; first + kLanes <= width; first += kLanes) {
      const float* lines = in + first * line_stride;
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes)
        transpose_square(out + k * kWidth + first, kWidth, lines + k, line_stride);
      for (; k < depth; ++k) {
        for (int64_t j = 0; j < kLanes; ++j)
          out[k * kWidth + first + j] = lines[j * line_stride + k];
      }
    }
  }
  for (int64_t j = first; j < width; ++j) {
    for (int64_t k = 0; k < depth; ++k) out[k * kWidth + j] = in[j * line_stride + k * k_stride];
  }
}

/// What becomes of a tile's sums.
struct Epilogue {
  float alpha, beta;  // beta 0: C is not read
  const float* bias;  // of the tile's first column, or null
};

inline void finish(float* c, const Lanes& sum, const Epilogue& e, int64_t column) {
  Lanes value = sum * e.alpha;
  if (e.beta != 0) value += load(c + column) * e.beta;
  if (e.bias) value += load(e.bias + column);
  store(c + column, value);
}

/// One tile of kRows rows. A's rows (or with kColumns its columns) are dense, `stride` apart.
template <int kRows, bool kColumns>
void tile(const float* a, int64_t stride, const float* b, int64_t depth, float* c, int64_t ldc,
          int64_t columns, const Epilogue& e) {
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + kPanel - 1, 1);
  }
  Lanes sums[kRows][2] = {};
  const float* group[(kRows + 2) / 3];  // a pointer for three rows: fewer addresses to keep
  for (int g = 0; g < (kRows + 2) / 3; ++g) group[g] = a + 3 * g * stride;
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes left = load(b + k * kPanel), right = load(b + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const float x = kColumns ? a[k * stride + i] : group[i / 3][(i % 3) * stride + k];
      sums[i][0] += x * left;
      sums[i][1] += x * right;
    }
  }
  if (columns == kPanel) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      finish(c + i * ldc, sums[i][0], e, 0);
      finish(c + i * ldc, sums[i][1], e, kLanes);
    }
    return;
  }
  alignas(64) float part[kRows][kPanel];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    store(part[i], sums[i][0]);
    store(part[i] + kLanes, sums[i][1]);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float value = part[i][j] * e.alpha;
      if (e.beta != 0) value += c[i * ldc + j] * e.beta;
      if (e.bias) value += e.bias[j];
      c[i * ldc + j] = value;
    }
  }
}

/// A whole tile, or the rows that are left as smaller ones.
template <bool kColumns>
void tile_rows(int64_t rows, const float* a, int64_t stride, const float* b, int64_t depth,
               float* c, int64_t ldc, int64_t columns, const Epilogue& e) {
  const auto next = [&]<int kRows>() {
    tile<kRows, kColumns>(a, stride, b, depth, c, ldc, columns, e);
    a += kColumns ? kRows : kRows * stride;
    c += kRows * ldc;
    rows -= kRows;
  };
  if (rows == kTileRows) return next.template operator()<kTileRows>();
  if constexpr (kTileRows > 8) {
    if (rows >= 8) next.template operator()<8>();
  }
  if (rows >= 4) next.template operator()<4>();
  if (rows >= 2) next.template operator()<2>();
  if (rows >= 1) next.template operator()<1>();
}

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Operands {
  const float *a, *b;
  int64_t a_row, a_k, b_k, b_column;
};

/// Rows that lie 4 KB apart share one set of the first-level cache and push each other out.
bool readable_in_place(const Operands& p) {
  return (p.a_k == 1 && p.a_row % 1024 != 0) || (p.a_row == 1 && p.a_k % 1024 != 0);
}

/// The part of a product whose operands fit the packing buffers. `done`, or null: what finishes its
/// blocks, which are complete here.
void product(GemmShape s, const Operands& p, Epilogue e, float* c, int64_t ldc,
             const BlockDone* done) {
  const bool packed = !readable_in_place(p);
  const int64_t tiles = pieces(s.m, kTileRows), panels = pieces(s.n, kPanel);
  const int64_t passes = pieces(s.k, kDepth);
  float* packed_b = scratch<float>(Scratch::GemmB, panels * kPanel * s.k);
  float* packed_a = packed ? scratch<float>(Scratch::GemmA, tiles * kTileRows * s.k) : nullptr;
  // Packed pieces follow each other by pass, then by panel or tile.
  const auto depth_of = [&](int64_t pass) { return std::min(kDepth, s.k - pass * kDepth); };
  const auto pack_b = [&](int64_t at) {
    const int64_t pass = at / panels, panel = at % panels, k0 = pass * kDepth;
    pack<kPanel>(packed_b + (panels * k0 + panel * depth_of(pass)) * kPanel,
                 p.b + panel * kPanel * p.b_column + k0 * p.b_k, p.b_column, p.b_k,
                 std::min(kPanel, s.n - panel * kPanel), depth_of(pass));
  };
  const auto pack_a = [&](int64_t at) {
    const int64_t pass = at / tiles, tile = at % tiles, k0 = pass * kDepth;
    pack<kTileRows>(packed_a + (tiles * k0 + tile * depth_of(pass)) * kTileRows,
                    p.a + tile * kTileRows * p.a_row + k0 * p.a_k, p.a_row, p.a_k,
                    std::min(kTileRows, s.m - tile * kTileRows), depth_of(pass));
  };
  const int64_t b_pieces = passes * panels, a_pieces = packed ? passes * tiles : 0;
  parallel_for(0, b_pieces + a_pieces, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) i < b_pieces ? pack_b(i) : pack_a(i - b_pieces);
  });

  const auto compute = [&](int64_t tile_begin, int64_t tile_end, int64_t panel_begin,
                           int64_t panel_end) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t depth = depth_of(pass), k0 = pass * kDepth;
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const float* b = packed_b + (panels * k0 + panel * depth) * kPanel;
        const int64_t column = panel * kPanel, columns = std::min(kPanel, s.n - column);
        const Epilogue end{e.alpha, pass == 0 ? e.beta : 1.0f,
                           e.bias && pass == 0 ? e.bias + column : nullptr};
        for (int64_t i = tile_begin; i < tile_end; ++i) {
          const int64_t row = i * kTileRows, rows = std::min(kTileRows, s.m - row);
          float* target = c + row * ldc + column;
          if (packed) {
            tile_rows<true>(rows, packed_a + (tiles * k0 + i * depth) * kTileRows, kTileRows, b,
                            depth, target, ldc, columns, end);
          } else if (p.a_k == 1) {
            tile_rows<false>(rows, p.a + row * p.a_row + k0, p.a_row, b, depth, target, ldc,
                             columns, end);
          } else {
            tile_rows<true>(rows, p.a + row + k0 * p.a_k, p.a_k, b, depth, target, ldc, columns,
                            end);
          }
        }
        const bool whole = (panel - panel_begin) % kDonePanels == kDonePanels - 1;
        if (done && pass == passes - 1 && (whole || panel == panel_end - 1)) {
          const int64_t first = panel - (panel - panel_begin) % kDonePanels;
          const int64_t row = tile_begin * kTileRows;
          (*done)({row, first * kPanel, std::min(tile_end * kTileRows, s.m) - row,
                   std::min((panel + 1) * kPanel, s.n) - first * kPanel});
        }
      }
    }
  };
  // Along whichever side divides more evenly among the threads, a few tiles a task.
  const int64_t threads = num_threads();
  const auto excess = [&](int64_t n) {
    return static_cast<double>(pieces(n, threads) * threads) / static_cast<double>(n);
  };
  const bool by_rows = excess(tiles) <= excess(panels);
  const int64_t extent = by_rows ? tiles : panels;
  const int64_t size = std::clamp<int64_t>(extent / (threads * 8), 1, 8);
  parallel_chunks(pieces(extent, size), [&](int64_t i) {
    const int64_t begin = i * size, end = std::min(begin + size, extent);
    if (by_rows)
      compute(begin, end, 0, panels);
    else
      compute(0, tiles, begin, end);
  });
}

}  // namespace

bool gemm_tiled(GemmShape s, float alpha, const MatrixRef& a, const MatrixRef& b, float beta,
                float* c, int64_t ldc, const float* bias, const BlockDone* done) {
  constexpr double kWorthwhile = 64.0 * 64 * 64;
  if (!kHaveTiles || s.m < 2 * kTileRows || s.n < kPanel || s.k < 16 || alpha == 0 ||
      static_cast<double>(s.m) * static_cast<double>(s.n) * static_cast<double>(s.k) < kWorthwhile)
    return false;
  const Operands all{static_cast<const float*>(a.data),
                     static_cast<const float*>(b.data),
                     a.row_stride,
                     a.col_stride,
                     b.row_stride,
                     b.col_stride};
  const int64_t row_block = readable_in_place(all) ? s.m : kMaxRows;
  for (int64_t j = 0; j < s.n; j += kMaxColumns) {
    for (int64_t k = 0; k < s.k; k += kMaxDepth) {
      for (int64_t i = 0; i < s.m; i += row_block) {
        Operands part = all;
        part.a += i * all.a_row + k * all.a_k;
        part.b += k * all.b_k + j * all.b_column;
        const bool first = k == 0, last = k + kMaxDepth >= s.k;
        const BlockDone shifted = [&, i, j](const Block& block) {
          (*done)({block.row + i, block.column + j, block.rows, block.columns});
        };
        product({std::min(row_block, s.m - i), std::min(kMaxColumns, s.n - j),
                 std::min(kMaxDepth, s.k - k)},
                part,
                {alpha, first ? (bias ? 0.0f : beta) : 1.0f, first && bias ? bias + j : nullptr},
                c + i * ldc + j, ldc, done && last ? &shifted : nullptr);
      }
    }
  }
  return true;
}

void pack_panels(float* out, const float* b, int64_t k_stride, int64_t column_stride, int64_t k,
                 int64_t n) {
  for (int64_t column = 0; column < n; column += kPanel) {
    pack<kPanel>(out + column * k, b + column * column_stride, column_stride, k_stride,
                 std::min(kPanel, n - column), k);
  }
}

void multiply_panels(GemmShape s, float alpha, const float* a, int64_t a_row, int64_t a_k,
                     const float* panels, int64_t depth, int64_t k0, float beta, float* c,
                     int64_t ldc) {
  const Epilogue end{alpha, beta, nullptr};
  for (int64_t row = 0; row < s.m; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, s.m - row);
    for (int64_t column = 0; column < s.n; column += kPanel) {
      const float* b = panels + column * depth + k0 * kPanel;
      float* target = c + row * ldc + column;
      if (a_k == 1)
        tile_rows<false>(rows, a + row * a_row, a_row, b, s.k, target, ldc, kPanel, end);
      else
        tile_rows<true>(rows, a + row, a_k, b, s.k, target, ldc, kPanel, end);
    }
  }
}

}  // namespace vt::cpu::VT_ISA
