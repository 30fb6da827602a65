// Reductions as three nested extents: [outer, reduced, inner] of a dense input. Work is cut in
// fixed pieces that are combined in order, so results do not depend on the number of threads.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {

struct ReducePlan {
  Tensor input;  // dense; the reduced dimensions are adjacent
  int64_t outer = 1, reduced = 1, inner = 1;
};

/// Finds (or makes, by a copy) a layout of `self` in which the dimensions whose extent differs
/// between it and the keepdim shape `kept` are adjacent.
inline ReducePlan plan_reduction(const Tensor& self, uint64_t mask) {
  ReducePlan plan;
  const int64_t n = self.dim();
  int64_t first = -1, last = -1, reduced_dims = 0;
  for (int64_t d = 0; d < n; ++d) {
    if (!(mask >> d & 1) || self.sizes()[d] == 1) continue;
    if (first < 0) first = d;
    last = d;
    ++reduced_dims;
  }
  bool adjacent = self.is_contiguous();
  for (int64_t d = first; adjacent && first >= 0 && d <= last; ++d)
    adjacent = (mask >> d & 1) || self.sizes()[d] == 1;
  if (adjacent) {
    plan.input = self;
    for (int64_t d = 0; d < n; ++d) {
      if (first >= 0 && d >= first && d <= last)
        plan.reduced *= self.sizes()[d];
      else if (first >= 0 && d > last)
        plan.inner *= self.sizes()[d];
      else
        plan.outer *= self.sizes()[d];
    }
    return plan;
  }
  // Kept dimensions first, reduced ones last.
  Dims sizes, strides;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t d = 0; d < n; ++d) {
      const bool is_reduced = mask >> d & 1;
      if (is_reduced != (pass == 1)) continue;
      sizes.push_back(self.sizes()[d]);
      strides.push_back(self.strides()[d]);
      (is_reduced ? plan.reduced : plan.outer) *= self.sizes()[d];
    }
  }
  const Tensor moved = make_view(self, sizes, strides, self.storage_offset());
  plan.input = moved.is_contiguous() ? moved : empty(sizes, self.dtype());
  if (!moved.is_contiguous()) kernels_for(DeviceType::CPU).copy_(plan.input, moved, false);
  return plan;
}

inline constexpr int kLanes = 16;
inline constexpr int64_t kNarrowStrip = 64;  // columns that still fill a cache line of any dtype
inline constexpr int64_t kChunk = 131072;    // elements (rows for inner > 1) a piece covers

/// An Op has `Acc`, `Acc start()`, `void step(Acc&, T)`, `void merge(Acc&, const Acc&)`, and may
/// have `Acc dense(const T*, n)` for a run of values where plain steps do not vectorise well.
/// Not inlined: it has several callers for each dtype, and all of the arithmetic.
template <class T, class Op>
[[gnu::noinline]] typename Op::Acc reduce_run(const Op& op, const T* values, int64_t n) {
  if constexpr (requires { op.dense(values, n); }) {
    return op.dense(values, n);
  } else {
    typename Op::Acc lanes[kLanes];
    for (auto& lane : lanes) lane = op.start();
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) {
      for (int l = 0; l < kLanes; ++l) op.step(lanes[l], values[k + l]);
    }
    for (; k < n; ++k) op.step(lanes[k % kLanes], values[k]);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) op.merge(lanes[l], lanes[l + width]);
    }
    return lanes[0];
  }
}

template <class T, class Op>
typename Op::Acc reduce_row(const Op& op, const char* data, int64_t n, DType dtype) {
  if (dtype == DTypeOf<T>::value) return reduce_run<T>(op, reinterpret_cast<const T*>(data), n);
  typename Op::Acc total = op.start();
  alignas(64) T buffer[kBlock];
  const int64_t size = item_size(dtype);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    load_block<T>(buffer, data + i * size, size, m, dtype, dtype);
    op.merge(total, reduce_run<T>(op, buffer, m));
  }
  return total;
}

/// result(index of the kept element, accumulator) for every kept element.
template <class T, class Op>
void reduce(const ReducePlan& plan, const Op& op,
            FunctionRef<void(int64_t index, typename Op::Acc)> result) {
  using Acc = typename Op::Acc;
  const auto* data = static_cast<const char*>(plan.input.data());
  const DType dtype = plan.input.dtype();
  const int64_t size = item_size(dtype);
  if (plan.outer * plan.inner == 0) return;
  if (plan.inner == 1) {
    if (plan.outer > 1 && plan.outer * 4 >= num_threads()) {
      parallel_for(0, plan.outer, std::max<int64_t>(1, kChunk / (plan.reduced + 1)),
                   [&](int64_t b, int64_t e) {
                     for (int64_t o = b; o < e; ++o) {
                       // Long rows are summed piece by piece here too, so that the result is the
                       // same however many rows there are.
                       Acc total = op.start();
                       for (int64_t c = 0; c < plan.reduced; c += kChunk) {
                         op.merge(total, reduce_row<T>(op, data + (o * plan.reduced + c) * size,
                                                       std::min(kChunk, plan.reduced - c), dtype));
                       }
                       result(o, total);
                     }
                   });
      return;
    }
    const int64_t pieces = (plan.reduced + kChunk - 1) / kChunk;
    std::vector<Acc> partial(static_cast<size_t>(pieces));
    for (int64_t o = 0; o < plan.outer; ++o) {
      parallel_chunks(pieces, [&](int64_t p) {
        const int64_t at = p * kChunk;
        partial[static_cast<size_t>(p)] = reduce_row<T>(op, data + (o * plan.reduced + at) * size,
                                                        std::min(kChunk, plan.reduced - at), dtype);
      });
      Acc total = op.start();
      for (const Acc& acc : partial) op.merge(total, acc);
      result(o, total);
    }
    return;
  }
  // Columns: a strip of accumulators walks down the rows; tall inputs are cut into pieces of rows.
  constexpr int64_t kStrip = 1024;
  const int64_t rows_each = 1024;
  const int64_t pieces = std::max<int64_t>(1, (plan.reduced + rows_each - 1) / rows_each);
  // Where there would be too few strips for the threads, narrower ones; sums stay the same.
  int64_t width = std::min(kStrip, plan.inner);
  while (width >= 2 * kNarrowStrip && plan.inner * plan.reduced >= kChunk / 8 &&
         plan.outer * pieces * ((plan.inner + width - 1) / width) < 2 * num_threads())
    width = (width / 2 + kLanes - 1) / kLanes * kLanes;
  const int64_t strips = (plan.inner + width - 1) / width;
  std::vector<Acc> partial(static_cast<size_t>(plan.outer * pieces * plan.inner));
  parallel_chunks(plan.outer * pieces * strips, [&](int64_t job) {
    const int64_t strip = job % strips, piece = job / strips % pieces, o = job / strips / pieces;
    const int64_t first = strip * width, m = std::min(width, plan.inner - first);
    Acc* acc = partial.data() + (o * pieces + piece) * plan.inner + first;
    for (int64_t k = 0; k < m; ++k) acc[k] = op.start();
    // Rows are taken several at a time, so that an accumulator is loaded once for them all.
    constexpr int kRows = 8;
    alignas(64) T buffer[kRows][kStrip];
    const bool direct = dtype == DTypeOf<T>::value;
    const auto load = [&](int64_t r, T* into) -> const T* {
      const char* row = data + ((o * plan.reduced + r) * plan.inner + first) * size;
      if (direct) return reinterpret_cast<const T*>(row);
      load_block<T>(into, row, size, m, dtype, dtype);
      return into;
    };
    int64_t r = piece * rows_each;
    const int64_t last = std::min(r + rows_each, plan.reduced);
    for (; r + kRows <= last; r += kRows) {
      const T* rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = load(r + i, buffer[i]);
      for (int64_t k = 0; k < m; ++k) {
        Acc a = acc[k];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) op.step(a, rows[i][k]);
        acc[k] = a;
      }
    }
    for (; r < last; ++r) {
      const T* row = load(r, buffer[0]);
      for (int64_t k = 0; k < m; ++k) op.step(acc[k], row[k]);
    }
  });
  for (int64_t o = 0; o < plan.outer; ++o) {
    for (int64_t k = 0; k < plan.inner; ++k) {
      Acc total = op.start();
      for (int64_t p = 0; p < pieces; ++p)
        op.merge(total, partial[static_cast<size_t>((o * pieces + p) * plan.inner + k)]);
      result(o * plan.inner + k, total);
    }
  }
}

/// Dimensions to reduce as a bit mask; none given means all.
inline uint64_t dim_mask(std::optional<IntSpan> dims, int64_t ndim) {
  const uint64_t all = ndim >= 64 ? ~uint64_t{0} : (uint64_t{1} << ndim) - 1;
  if (!dims || dims->empty()) return all;
  uint64_t mask = 0;
  for (const int64_t d : *dims) mask |= uint64_t{1} << wrap_dim(d, ndim);
  return mask & all;
}
/// The same for any and all, which an empty list leaves nothing to reduce.
inline uint64_t tested_mask(std::optional<IntSpan> dims, int64_t ndim) {
  return dims && dims->empty() ? 0 : dim_mask(dims, ndim);
}

/// The mask of one dimension, which may be negative; a 0-d tensor has none.
inline uint64_t one_dim(int64_t dim, int64_t ndim) {
  return ndim == 0 ? 0 : uint64_t{1} << wrap_dim(dim, ndim);
}

/// Calls `f.template operator()<T>()` with a type that holds the values of `dtype`, for kernels
/// that load and store blocks: bool as uint8, the rarer integers as wider ones, 16-bit floats as
/// float.
template <class F>
void visit_values(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Bool:
    case DType::UInt8:
      return f.template operator()<uint8_t>();
    case DType::Int8:
    case DType::Int16:
    case DType::Int32:
      return f.template operator()<int32_t>();
    case DType::Int64:
      return f.template operator()<int64_t>();
    default:
      return visit_float(dtype, f);
  }
}
/// The same where the arithmetic is no more for wide integers.
template <class F>
void visit_wide(DType dtype, F&& f) {
  if (is_floating(dtype)) return visit_float(dtype, f);
  return f.template operator()<int64_t>();
}

/// Writes values of a compute type as element `index` of a dense output.
template <class T>
void put(const Tensor& out, int64_t index, T value) {
  store_block<T>(static_cast<char*>(out.data()) + index * out.itemsize(), out.itemsize(), &value, 1,
                 out.dtype());
}

}  // namespace vt::cpu::VT_ISA
