// sum, mean, prod, any, all, count_nonzero.
#include "cpu/kernels/reduce.h"

#include <cstring>

namespace vt::cpu::VT_ISA {
namespace {

/// Sums carry 64 bits: float inputs in double, integers in int64.
template <class T>
using Wide = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;

template <class T>
struct Sum {
  using Acc = Wide<T>;
  Acc start() const { return 0; }
  void step(Acc& a, T x) const { a += static_cast<Acc>(x); }
  void merge(Acc& a, const Acc& b) const { a += b; }
  /// Eight independent vectors of doubles: one alone would wait for each addition. They are as wide
  /// as what one instruction converts from memory; twice as wide takes longer for the same numbers.
  Acc dense(const T* values, int64_t n) const
    requires std::is_same_v<T, float>
  {
    typedef double Doubles __attribute__((vector_size(32)));
    constexpr int64_t kDoubles = 4;
    // Where conversions and additions share their units but multiplications do not, x * 1 + sum is
    // faster by two thirds. The compiler must not see the 1.
    static const volatile double kOne = 1;
    [[maybe_unused]] const double one = kOne;
    const auto add = [one](Doubles& sum, const float* x) {
      // Element by element: GCC makes this one conversion from memory, where of
      // __builtin_convertvector it makes two halves that it puts together.
      const Doubles wide{x[0], x[1], x[2], x[3]};
#ifdef __FMA__
      sum += wide * one;
#else
      sum += wide;
#endif
    };
    // A step adds up four cache lines. In a long run they lie far apart: the hardware fetches ahead
    // no further than a page, so four pages at a time wait less at their ends.
    constexpr int kLines = 4;
    constexpr int64_t kLine = 16, kAhead = 4 * kLine, kLong = 65536;
    const int64_t steps = n / (kLines * kLine);
    const int64_t apart = n >= kLong ? steps * kLine : kLine;
    const int64_t advance = n >= kLong ? kLine : kLines * kLine;
    Doubles sum = {}, other = {};
    if (steps > 0) {
      Doubles sums[2 * kLines] = {};
      const float* at = values;
      for (int64_t i = 0; i < steps; ++i, at += advance) {
#pragma GCC unroll 4
        for (int c = 0; c < kLines; ++c) {
          const float* line = at + c * apart;
          __builtin_prefetch(line + kAhead);
          for (int64_t l = 0; l < kLine; l += 2 * kDoubles) {
            add(sums[2 * c], line + l);
            add(sums[2 * c + 1], line + l + kDoubles);
          }
        }
      }
      sum = (sums[0] + sums[2]) + (sums[4] + sums[6]);
      other = (sums[1] + sums[3]) + (sums[5] + sums[7]);
    }
    int64_t k = steps * kLines * kLine;
    for (; k + 2 * kDoubles <= n; k += 2 * kDoubles) {
      add(sum, values + k);
      add(other, values + k + kDoubles);
    }
    sum += other;
    double total = 0;
    for (; k < n; ++k) total += values[k];
    return total + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
};
template <class T>
struct Product {
  using Acc = Wide<T>;
  Acc start() const { return 1; }
  void step(Acc& a, T x) const { a *= static_cast<Acc>(x); }
  void merge(Acc& a, const Acc& b) const { a *= b; }
};
template <class T>
struct Count {
  using Acc = int64_t;
  Acc start() const { return 0; }
  void step(Acc& a, T x) const { a += x != T(0); }
  void merge(Acc& a, const Acc& b) const { a += b; }
};

template <template <class> class Op>
void accumulate(const Tensor& out, const Tensor& self, uint64_t mask, double scale) {
  const ReducePlan plan = plan_reduction(self, mask);
  visit_values(self.dtype(), [&]<class T>() {
    reduce<T>(plan, Op<T>(), [&](int64_t i, auto acc) {
      if constexpr (std::is_floating_point_v<decltype(acc)>)
        put<double>(out, i, acc * scale);
      else
        put<int64_t>(out, i, acc);
    });
  });
}

/// result(index of the kept element, how many of its elements are not zero, of how many).
void count(const Tensor& self, uint64_t mask,
           FunctionRef<void(int64_t index, int64_t nonzero, int64_t all)> result) {
  const ReducePlan plan = plan_reduction(self, mask);
  visit_values(self.dtype(), [&]<class T>() {
    reduce<T>(plan, Count<T>(), [&](int64_t i, int64_t n) { result(i, n, plan.reduced); });
  });
}

/// `self` as the dtype the sum is asked in, where that is not what the accumulator gives anyway.
Tensor as_summand(const Tensor& self, std::optional<DType> dtype) {
  if (!dtype || *dtype == self.dtype() ||
      (is_floating(*dtype) && is_floating(self.dtype()) && !is_reduced_float(*dtype)))
    return self;
  if (is_floating(*dtype) == is_floating(self.dtype()) && is_integral(*dtype)) return self;
  const Tensor converted = empty(self.sizes(), *dtype);
  kernels_for(DeviceType::CPU)._to_dtype(converted, self.is_contiguous() ? self : self, *dtype);
  return converted;
}

const RegisterCpu registered([](KernelTable& t) {
  t.sum_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool,
                 std::optional<DType> dtype) {
    accumulate<Sum>(out, as_summand(self, dtype), dim_mask(dim, self.dim()), 1.0);
  };
  t.mean_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool,
                  std::optional<DType> dtype) {
    const uint64_t mask = dim_mask(dim, self.dim());
    int64_t count = 1;
    for (int64_t d = 0; d < self.dim(); ++d) count *= (mask >> d & 1) ? self.sizes()[d] : 1;
    const Tensor input =
        is_floating(self.dtype()) ? self : as_summand(self, dtype.value_or(DType::Float64));
    accumulate<Sum>(out, input, mask, 1.0 / static_cast<double>(count));
  };
  t.prod = [](const Tensor& out, const Tensor& self, std::optional<DType> dtype) {
    accumulate<Product>(out, as_summand(self, dtype), dim_mask(std::nullopt, self.dim()), 1.0);
  };
  t.prod_dim = [](const Tensor& out, const Tensor& self, int64_t dim, bool,
                  std::optional<DType> dtype) {
    accumulate<Product>(out, as_summand(self, dtype), one_dim(dim, self.dim()), 1.0);
  };
  t.any_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool) {
    count(self, tested_mask(dim, self.dim()),
          [&](int64_t i, int64_t nonzero, int64_t) { put<bool>(out, i, nonzero > 0); });
  };
  t.all_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool) {
    count(self, tested_mask(dim, self.dim()),
          [&](int64_t i, int64_t nonzero, int64_t all) { put<bool>(out, i, nonzero == all); });
  };
  t.count_nonzero = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim) {
    count(self, dim_mask(dim, self.dim()),
          [&](int64_t i, int64_t nonzero, int64_t) { put<int64_t>(out, i, nonzero); });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
