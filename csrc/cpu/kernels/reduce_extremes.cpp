// amax, amin, max and min with indices, argmax, argmin.
#include "cpu/kernels/reduce.h"

#include <cstring>
#include <limits>

#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

/// The largest (or least) value; nan wins and stays.
template <class T, bool kMax>
struct Extremum {
  using Acc = T;
  static constexpr bool kFloat = std::is_floating_point_v<T>;
  Acc start() const {
    using Limits = std::numeric_limits<T>;
    if constexpr (kMax) return kFloat ? -Limits::infinity() : Limits::lowest();
    return kFloat ? Limits::infinity() : Limits::max();
  }
  void step(Acc& a, T x) const { a = (!(kMax ? x <= a : x >= a)) & (a == a) ? x : a; }
  void merge(Acc& a, const Acc& b) const { step(a, b); }
  /// The extreme of the numbers and, apart from it, whether there was a nan: both vectorise.
  Acc dense(const T* values, int64_t n) const {
    // As wide as a register, not wider: GCC takes comparisons of wider ones apart, lane by lane.
    using Lanes = Vector<T>;
    constexpr int64_t kWidth = VectorOf<T>::lanes;
    T total = start();
    bool any_nan = false;
    int64_t k = 0;
    if (n >= kWidth) {
      constexpr int kChains = 4;
      const auto keep_better = [](auto& a, const auto& b) { a = (kMax ? b > a : b < a) ? b : a; };
      Lanes best[kChains] = {}, x;
      for (Lanes& lanes : best) lanes += total;
      decltype(x != x) nan = {};
      const auto take = [&](Lanes& lanes, const T* from) {
        std::memcpy(&x, from, sizeof(x));
        keep_better(lanes, x);
        if constexpr (kFloat) nan |= x != x;
      };
      for (; k + kChains * kWidth <= n; k += kChains * kWidth) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) take(best[c], values + k + c * kWidth);
      }
      for (; k + kWidth <= n; k += kWidth) take(best[0], values + k);
      // Without branches, which nobody could foresee: in a short row this is half of the work.
      keep_better(best[0], best[1]);
      keep_better(best[2], best[3]);
      keep_better(best[0], best[2]);
      T lanes[kWidth];
      std::memcpy(lanes, &best[0], sizeof(lanes));
      for (int width = kWidth / 2; width > 0; width /= 2) {
        for (int l = 0; l < width; ++l) keep_better(lanes[l], lanes[l + width]);
      }
      total = lanes[0];
      if constexpr (kFloat) {
        for (int l = 0; l < kWidth; ++l) any_nan |= nan[l] != 0;
      }
    }
    for (; k < n; ++k) step(total, values[k]);
    if constexpr (kFloat) {
      if (any_nan) return std::numeric_limits<T>::quiet_NaN();
    }
    return total;
  }
};
template <class T>
using Max = Extremum<T, true>;
template <class T>
using Min = Extremum<T, false>;
template <template <class> class Op>
void extremum(const Tensor& out, const Tensor& self, uint64_t mask) {
  const ReducePlan plan = plan_reduction(self, mask);
  visit_values(self.dtype(), [&]<class T>() {
    reduce<T>(plan, Op<T>(), [&](int64_t i, T acc) { put<T>(out, i, acc); });
  });
}

/// Whether `x` beats an earlier `best`: nan beats all but an earlier nan.
template <class T, bool kMax>
bool better(T x, T best) {
  return best == best && (x != x || (kMax ? x > best : x < best));
}

template <class T>
struct Extreme {
  T value{};
  int64_t index = 0;
};

/// The first extreme of `n` > 0 dense elements: block by block the value alone, which vectorises,
/// and its place only in a block that beats what came before.
template <class T, bool kMax>
Extreme<T> first_extreme(const char* data, int64_t n, DType dtype) {
  using Op = std::conditional_t<kMax, Max<T>, Min<T>>;
  const Op op;
  const int64_t size = item_size(dtype);
  const bool direct = dtype == DTypeOf<T>::value;
  alignas(64) T buffer[kBlock];
  Extreme<T> top;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    const T* values = reinterpret_cast<const T*>(data + at * size);
    if (!direct) {
      load_block<T>(buffer, data + at * size, size, m, dtype, dtype);
      values = buffer;
    }
    const T best = reduce_run<T>(op, values, m);
    if (at > 0 && !better<T, kMax>(best, top.value)) continue;
    top.value = best;
    int64_t k = 0;
    while (!(values[k] == best || (best != best && values[k] != values[k]))) ++k;
    top.index = at + k;
  }
  return top;
}

/// The first extreme element of each row of [outer, reduced, inner], where `values` is defined, and
/// its position.
template <class T, bool kMax>
void arg_extremum(const ReducePlan& plan, const Tensor& values, const Tensor& indices) {
  const auto result = [&, at = indices.data_as<int64_t>()](int64_t i, T value, int64_t index) {
    if (values.defined()) put<T>(values, i, value);
    at[i] = index;
  };
  const auto* data = static_cast<const char*>(plan.input.data());
  const DType dtype = plan.input.dtype();
  const int64_t size = item_size(dtype);
  if (plan.outer * plan.inner == 0) return;
  if (plan.outer == 1 && plan.inner == 1) {
    const int64_t pieces = (plan.reduced + kChunk - 1) / kChunk;
    std::vector<Extreme<T>> partial(static_cast<size_t>(pieces));
    parallel_chunks(pieces, [&](int64_t p) {
      const int64_t at = p * kChunk;
      auto& found = partial[static_cast<size_t>(p)];
      found = first_extreme<T, kMax>(data + at * size, std::min(kChunk, plan.reduced - at), dtype);
      found.index += at;
    });
    Extreme<T> top = partial[0];
    for (const auto& found : partial) {
      if (better<T, kMax>(found.value, top.value)) top = found;
    }
    result(0, top.value, top.index);
    return;
  }
  if (plan.inner == 1) {
    parallel_for(0, plan.outer, std::max<int64_t>(1, kChunk / (plan.reduced + 1)),
                 [&](int64_t b, int64_t e) {
                   for (int64_t o = b; o < e; ++o) {
                     const auto top = first_extreme<T, kMax>(data + o * plan.reduced * size,
                                                             plan.reduced, dtype);
                     result(o, top.value, top.index);
                   }
                 });
    return;
  }
  const int64_t strips = (plan.inner + kBlock - 1) / kBlock;
  parallel_chunks(plan.outer * strips, [&](int64_t job) {
    const int64_t o = job / strips, first = job % strips * kBlock,
                  m = std::min(kBlock, plan.inner - first);
    T row[kBlock], best[kBlock];
    int64_t at[kBlock];
    for (int64_t r = 0; r < plan.reduced; ++r) {
      load_block<T>(row, data + ((o * plan.reduced + r) * plan.inner + first) * size, size, m,
                    dtype, dtype);
      for (int64_t k = 0; k < m; ++k) {
        if (r == 0 || better<T, kMax>(row[k], best[k])) {
          best[k] = row[k];
          at[k] = r;
        }
      }
    }
    for (int64_t k = 0; k < m; ++k) result(o * plan.inner + first + k, best[k], at[k]);
  });
}

template <bool kMax>
void extremum_dim(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim,
                  bool) {
  const ReducePlan plan = plan_reduction(self, one_dim(dim, self.dim()));
  visit_values(self.dtype(), [&]<class T>() { arg_extremum<T, kMax>(plan, values, indices); });
}
template <bool kMax>
void arg_reduce(const Tensor& out, const Tensor& self, std::optional<int64_t> dim, bool) {
  const uint64_t mask = dim ? one_dim(*dim, self.dim()) : dim_mask(std::nullopt, self.dim());
  const ReducePlan plan = plan_reduction(self, mask);
  visit_values(self.dtype(), [&]<class T>() { arg_extremum<T, kMax>(plan, Tensor(), out); });
}

const RegisterCpu registered([](KernelTable& t) {
  t.amax = [](const Tensor& out, const Tensor& self, IntSpan dim, bool) {
    extremum<Max>(out, self, dim_mask(dim, self.dim()));
  };
  t.amin = [](const Tensor& out, const Tensor& self, IntSpan dim, bool) {
    extremum<Min>(out, self, dim_mask(dim, self.dim()));
  };
  t.max_dim = extremum_dim<true>;
  t.min_dim = extremum_dim<false>;
  t.argmax = arg_reduce<true>;
  t.argmin = arg_reduce<false>;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
