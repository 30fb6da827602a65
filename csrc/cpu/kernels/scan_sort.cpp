// Running sums and products, and sorting, along one dimension.
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "cpu/kernels/reduce.h"

namespace vt::cpu::VT_ISA {
namespace {

struct Extents {
  int64_t outer = 1, length = 1, inner = 1;
};
Extents extents_of(const Tensor& t, int64_t dim) {
  Extents e;
  if (t.dim() == 0) return e;
  const int64_t d = wrap_dim(dim, t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) (i < d ? e.outer : i == d ? e.length : e.inner) *= t.sizes()[i];
  return e;
}

Tensor dense(const Tensor& t, DType dtype) {
  if (t.is_contiguous() && t.dtype() == dtype) return t;
  const Tensor out = empty(t.sizes(), dtype);
  kernels_for(DeviceType::CPU).copy_(out, t, false);
  return out;
}

template <bool kProduct>
void scan(const Tensor& out, const Tensor& self, int64_t dim) {
  const Tensor input = dense(self, out.dtype());
  const Extents e = extents_of(input, dim);
  const int64_t size = input.itemsize();
  visit_values(out.dtype(), [&]<class T>() {
    using Acc = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;
    parallel_for(0, e.outer * e.inner, std::max<int64_t>(1, 16384 / (e.length + 1)), [&](int64_t b, int64_t end) {
      for (int64_t lane = b; lane < end; ++lane) {
        const int64_t start = lane / e.inner * e.length * e.inner + lane % e.inner;
        Acc total = kProduct ? 1 : 0;
        for (int64_t i = 0; i < e.length; ++i) {
          const int64_t at = (start + i * e.inner) * size;
          T x;
          load_block<T>(&x, static_cast<const char*>(input.data()) + at, size, 1, input.dtype(), input.dtype());
          total = kProduct ? total * static_cast<Acc>(x) : total + static_cast<Acc>(x);
          const T y = static_cast<T>(total);
          store_block<T>(static_cast<char*>(out.data()) + at, size, &y, 1, out.dtype());
        }
      }
    });
  });
}

void sort(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim, bool descending, bool) {
  const Tensor input = dense(self, self.dtype());
  const Extents e = extents_of(input, dim);
  const int64_t size = input.itemsize();
  auto* index_out = indices.data_as<int64_t>();
  visit_values(self.dtype(), [&]<class T>() {
    parallel_for(0, e.outer * e.inner, std::max<int64_t>(1, 4096 / (e.length + 1)), [&](int64_t b, int64_t end) {
      std::vector<T> keys(static_cast<size_t>(e.length));
      std::vector<int64_t> order(keys.size());
      for (int64_t lane = b; lane < end; ++lane) {
        const int64_t start = lane / e.inner * e.length * e.inner + lane % e.inner;
        for (int64_t i = 0; i < e.length; ++i) {
          T x;
          load_block<T>(&x, static_cast<const char*>(input.data()) + (start + i * e.inner) * size, size, 1, input.dtype(), input.dtype());
          keys[static_cast<size_t>(i)] = x;
        }
        std::iota(order.begin(), order.end(), int64_t{0});
        // nan counts as the largest.
        auto less = [&](int64_t i, int64_t j) {
          const T x = keys[static_cast<size_t>(i)], y = keys[static_cast<size_t>(j)];
          return descending ? (y == y && (x > y || x != x)) : (x == x && (x < y || y != y));
        };
        std::stable_sort(order.begin(), order.end(), less);
        for (int64_t i = 0; i < e.length; ++i) {
          const T x = keys[static_cast<size_t>(order[static_cast<size_t>(i)])];
          const int64_t at = start + i * e.inner;
          store_block<T>(static_cast<char*>(values.data()) + at * size, size, &x, 1, values.dtype());
          index_out[at] = order[static_cast<size_t>(i)];
        }
      }
    });
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.cumsum = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) { scan<false>(out, self, dim); };
  t.cumprod = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) { scan<true>(out, self, dim); };
  t.sort = sort;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
