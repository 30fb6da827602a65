// Running sums and products, and sorting, along one dimension.
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/extents.h"
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/reduce.h"

namespace vt::cpu::VT_ISA {
namespace {

template <bool kProduct>
void scan(const Tensor& out, const Tensor& self, int64_t dim) {
  const Tensor input = dense_as(self, out.dtype());
  const Extents e = extents_of(input.sizes(), dim);
  if (input.numel() == 0) return;
  const int64_t size = input.itemsize();
  const auto* from = static_cast<const char*>(input.data());
  auto* to = static_cast<char*>(out.data());
  const DType dtype = out.dtype();
  visit_wide(dtype, [&]<class T>() {
    using Acc = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;
    auto next = [](Acc total, T x) {
      return kProduct ? total * static_cast<Acc>(x) : total + static_cast<Acc>(x);
    };
    const Acc start = kProduct ? 1 : 0;
    if (e.inner == 1) {
      parallel_for(0, e.outer, std::max<int64_t>(1, 16384 / e.length), [&](int64_t b, int64_t end) {
        T block[kBlock];
        for (int64_t o = b; o < end; ++o) {
          Acc total = start;
          for (int64_t i = 0; i < e.length; i += kBlock) {
            const int64_t m = std::min(kBlock, e.length - i), at = (o * e.length + i) * size;
            load_block<T>(block, from + at, size, m, dtype, dtype);
            for (int64_t k = 0; k < m; ++k)
              block[k] = static_cast<T>(total = next(total, block[k]));
            store_block<T>(to + at, size, block, m, dtype);
          }
        }
      });
      return;
    }
    // Strips of neighbouring lanes walk down together, so memory is read in order.
    const int64_t strips = (e.inner + kBlock - 1) / kBlock;
    parallel_chunks(e.outer * strips, [&](int64_t job) {
      const int64_t o = job / strips, first = job % strips * kBlock,
                    m = std::min(kBlock, e.inner - first);
      T block[kBlock];
      Acc total[kBlock];
      std::fill_n(total, m, start);
      for (int64_t i = 0; i < e.length; ++i) {
        const int64_t at = ((o * e.length + i) * e.inner + first) * size;
        load_block<T>(block, from + at, size, m, dtype, dtype);
        for (int64_t k = 0; k < m; ++k)
          block[k] = static_cast<T>(total[k] = next(total[k], block[k]));
        store_block<T>(to + at, size, block, m, dtype);
      }
    });
  });
}

template <class T>
struct Item {
  T key;
  int64_t index;
};

/// Stable, nan as the largest: nan is set aside first, so the rest compares plainly.
template <class T>
void sort_items(std::vector<Item<T>>& items, bool descending) {
  auto begin = items.begin(), end = items.end();
  if constexpr (std::is_floating_point_v<T>) {
    auto is_nan = [](const Item<T>& x) { return x.key != x.key; };
    if (std::any_of(begin, end, is_nan)) {
      if (descending)
        begin = std::stable_partition(begin, end, is_nan);
      else
        end = std::stable_partition(begin, end, [&](const Item<T>& x) { return !is_nan(x); });
    }
  }
  if (descending)
    std::stable_sort(begin, end, [](const Item<T>& a, const Item<T>& b) { return a.key > b.key; });
  else
    std::stable_sort(begin, end, [](const Item<T>& a, const Item<T>& b) { return a.key < b.key; });
}

void sort(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim,
          bool descending, bool) {
  const Tensor input = dense_as(self, self.dtype());
  const Extents e = extents_of(input.sizes(), dim);
  if (input.numel() == 0) return;
  const int64_t size = input.itemsize();
  auto* index_out = indices.data_as<int64_t>();
  visit_wide(self.dtype(), [&]<class T>() {
    parallel_for(
        0, e.outer * e.inner, std::max<int64_t>(1, 4096 / (e.length + 1)),
        [&](int64_t b, int64_t end) {
          std::vector<T> keys(static_cast<size_t>(std::min(e.length, kBlock)));
          std::vector<Item<T>> items(static_cast<size_t>(e.length));
          for (int64_t lane = b; lane < end; ++lane) {
            const int64_t start = lane / e.inner * e.length * e.inner + lane % e.inner;
            for (int64_t i = 0; i < e.length; i += kBlock) {
              const int64_t m = std::min(kBlock, e.length - i);
              load_block<T>(keys.data(),
                            static_cast<const char*>(input.data()) + (start + i * e.inner) * size,
                            size * e.inner, m, input.dtype(), input.dtype());
              for (int64_t k = 0; k < m; ++k)
                items[static_cast<size_t>(i + k)] = {keys[static_cast<size_t>(k)], i + k};
            }
            sort_items(items, descending);
            for (int64_t i = 0; i < e.length; i += kBlock) {
              const int64_t m = std::min(kBlock, e.length - i);
              for (int64_t k = 0; k < m; ++k) {
                const Item<T>& item = items[static_cast<size_t>(i + k)];
                keys[static_cast<size_t>(k)] = item.key;
                index_out[start + (i + k) * e.inner] = item.index;
              }
              store_block<T>(static_cast<char*>(values.data()) + (start + i * e.inner) * size,
                             size * e.inner, keys.data(), m, values.dtype());
            }
          }
        });
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.cumsum = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    scan<false>(out, self, dim);
  };
  t.cumprod = [](const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
    scan<true>(out, self, dim);
  };
  t.sort = sort;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
