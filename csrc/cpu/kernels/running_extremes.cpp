// cummax and cummin, and scatter with a product or an extreme. Both walk in index order, one
// thread a lane, so equal inputs give equal outputs.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/reduce.h"

namespace vt::cpu::VT_ISA {
namespace {

/// nan is the largest and the smallest at once, and stays.
template <class T>
bool replaces(T x, T best, bool max) {
  if (x != x) return true;
  return best == best && (max ? x >= best : x <= best);
}

template <bool kMax>
void running_extreme(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim) {
  const Tensor input = dense(self);
  int64_t length = 1, inner = 1;
  if (self.dim() > 0) {
    const int64_t d = wrap_dim(dim, self.dim());
    length = self.sizes()[d];
    for (int64_t i = d + 1; i < self.dim(); ++i) inner *= self.sizes()[i];
  }
  if (self.numel() == 0) return;
  const int64_t size = input.itemsize(), lanes = input.numel() / length;
  auto* at = indices.data_as<int64_t>();
  visit_wide(self.dtype(), [&]<class T>() {
    parallel_for(0, lanes, std::max<int64_t>(1, 16384 / length), [&](int64_t b, int64_t e) {
      for (int64_t lane = b; lane < e; ++lane) {
        const int64_t start = lane / inner * length * inner + lane % inner;
        T best{};
        int64_t where = 0;
        for (int64_t i = 0; i < length; ++i) {
          const int64_t position = start + i * inner;
          T x;
          load_block<T>(&x, static_cast<const char*>(input.data()) + position * size, size, 1,
                        input.dtype(), input.dtype());
          if (i == 0 || replaces(x, best, kMax)) {
            best = x;
            where = i;
          }
          put<T>(values, position, best);
          at[position] = where;
        }
      }
    });
  });
}

void scatter_reduce(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index,
                    const Tensor& src, std::string_view reduce, bool include_self) {
  kernels_for(DeviceType::CPU).copy_(out, self, false);
  if (index.numel() == 0) return;
  check(index.dtype() == DType::Int64, "scatter_reduce(): Expected dtype int64 for index, got ",
        index.dtype());
  check(index.dim() == src.dim() && index.dim() == self.dim(), "scatter_reduce(): index ",
        index.sizes(), ", src ", src.sizes(), " and self ", self.sizes(),
        " must have the same number of dimensions");
  const int64_t n = index.dim(), d = n == 0 ? 0 : wrap_dim(dim, n);
  for (int64_t k = 0; k < n; ++k) {
    check(index.sizes()[k] <= src.sizes()[k] && (k == d || index.sizes()[k] <= self.sizes()[k]),
          "scatter_reduce(): Expected index ", index.sizes(), " to be no larger than self ",
          self.sizes(), " apart from dimension ", d, " and no larger than src ", src.sizes());
  }
  const Tensor positions = dense(index),
               values = dense(
                   n == 0 ? src
                          : make_view(src, index.sizes(), src.strides(), src.storage_offset()));
  const auto* at = positions.data_as<int64_t>();
  const int64_t size = out.itemsize(), length = n == 0 ? 1 : self.sizes()[d];
  const Dims strides = contiguous_strides(self.sizes());
  std::vector<bool> seen(include_self ? 0 : static_cast<size_t>(out.numel()));
  visit_wide(out.dtype(), [&]<class T>() {
    Dims counter(static_cast<size_t>(n), int64_t{0});
    for (int64_t i = 0; i < index.numel(); ++i) {
      check_index(at[i] >= 0 && at[i] < length, "index ", at[i], " is out of bounds for dimension ",
                  d, " with size ", length);
      int64_t place = 0;
      for (int64_t k = 0; k < n; ++k) place += (k == d ? at[i] : counter[k]) * strides[k];
      for (int64_t k = n - 1; k >= 0 && ++counter[k] == index.sizes()[k]; --k) counter[k] = 0;
      T x, y;
      load_block<T>(&x, static_cast<const char*>(values.data()) + i * size, size, 1, out.dtype(),
                    out.dtype());
      load_block<T>(&y, static_cast<const char*>(out.data()) + place * size, size, 1, out.dtype(),
                    out.dtype());
      const bool first = !include_self && !seen[static_cast<size_t>(place)];
      if (!include_self) seen[static_cast<size_t>(place)] = true;
      if (first)
        y = x;
      else if (reduce == "prod")
        y = static_cast<T>(y * x);
      else if (replaces(x, y, reduce == "amax"))
        y = x;
      put<T>(out, place, y);
    }
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.cummax = running_extreme<true>;
  t.cummin = running_extreme<false>;
  t._scatter_reduce = scatter_reduce;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
