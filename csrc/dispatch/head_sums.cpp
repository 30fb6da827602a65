#include "dispatch/head_sums.h"

#include <algorithm>

namespace vt {
namespace {

/// Columns of a matrix of B * T rows, and where their sums go.
struct Columns {
  Tensor data, sums;
  int64_t rows, stride, count;

  bool before(const Columns& next) const {
    return data.storage() == next.data.storage() && data.dtype() == next.data.dtype() &&
           rows == next.rows && stride == next.stride &&
           data.storage_offset() + count == next.data.storage_offset() &&
           sums.storage() == next.sums.storage() && sums.dtype() == next.sums.dtype() &&
           sums.storage_offset() + count == next.sums.storage_offset();
  }
};

/// The tensor as such columns, if its heads lie one after the other in rows of one distance.
std::optional<Columns> columns_of(const HeadSums& item) {
  const auto sizes = item.heads.sizes(), strides = item.heads.strides();
  const int64_t b = sizes[0], h = sizes[1], t = sizes[2], d = sizes[3];
  if (b * h * t * d == 0 || (d > 1 && strides[3] != 1) || (h > 1 && strides[1] != d)) return {};
  const int64_t stride = t > 1 ? strides[2] : b > 1 ? strides[0] : h * d;
  if (stride < h * d || (b > 1 && strides[0] != t * stride)) return {};
  return Columns{item.heads, item.sums, b * t, stride, h * d};
}

}  // namespace

void sum_head_rows(const KernelTable& kernels, std::span<const HeadSums> list,
                   std::optional<DType> dtype) {
  SmallVector<Columns, 4> matrices;
  for (const HeadSums& item : list) {
    if (!item.sums.defined()) continue;
    if (auto columns = columns_of(item)) {
      matrices.push_back(std::move(*columns));
      continue;
    }
    const int64_t h = item.heads.sizes()[1], d = item.heads.sizes()[3];
    const int64_t over[] = {0, 2};
    kernels.sum_dim(make_view(item.sums, Dims{h, d}, Dims{d, 1}, item.sums.storage_offset()),
                    item.heads, IntSpan(over), false, dtype);
  }
  std::ranges::sort(matrices, {}, [](const Columns& c) { return c.data.storage_offset(); });
  const int64_t over[] = {0};
  for (size_t i = 0; i < matrices.size();) {
    const Columns& first = matrices[i];
    int64_t count = first.count;
    size_t next = i + 1;
    for (; next < matrices.size() && matrices[next - 1].before(matrices[next]); ++next)
      count += matrices[next].count;
    kernels.sum_dim(make_view(first.sums, Dims{count}, Dims{1}, first.sums.storage_offset()),
                    make_view(first.data, Dims{first.rows, count}, Dims{first.stride, 1},
                              first.data.storage_offset()),
                    IntSpan(over), false, dtype);
    i = next;
  }
}

}  // namespace vt
