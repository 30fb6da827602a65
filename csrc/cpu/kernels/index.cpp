// index_select, index_add_, index_copy_, gather, scatter and cat. Additions run in index order, so
// they are deterministic.
#include <cstring>

#include "core/extents.h"
#include "cpu/kernels/dense_rows.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // bytes a thread moves at least

/// Indices as dense int64, each in [0, length). Negative ones count from the end where allowed.
/// gather and scatter raise RuntimeError, the others IndexError.
Tensor checked_indices(const Tensor& index, int64_t length, int64_t dim, bool wrap,
                       std::string_view op, ErrorKind kind = ErrorKind::Index) {
  Tensor out = dense_as(index, DType::Int64);
  auto* values = out.data_as<int64_t>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    const int64_t v = values[i];
    if (v >= 0 && v < length) continue;
    if (!(wrap && v < 0 && v >= -length)) {
      fail(kind, "index ", v, " is out of bounds for dimension ", dim, " with size ", length, " (",
           op, ")");
    }
    if (out.is_same(index)) {
      out = empty(index.sizes(), DType::Int64);
      kernels_for(DeviceType::CPU).copy_(out, index, false);
      values = out.data_as<int64_t>();
    }
    values[i] = v + length;
  }
  return out;
}

void index_select(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index) {
  const Tensor input = dense_as(self, self.dtype());
  const Extents e = extents_of(input.sizes(), dim);
  const Tensor indices = checked_indices(index, e.length, dim, false, "index_select");
  const auto* at = indices.data_as<int64_t>();
  const int64_t count = indices.numel(), bytes = e.inner * input.itemsize();
  const auto* from = static_cast<const char*>(input.data());
  auto* to = static_cast<char*>(out.data());
  parallel_for(
      0, e.outer * count, std::max<int64_t>(1, kGrain / (bytes + 1)), [&](int64_t b, int64_t end) {
        for (int64_t i = b; i < end; ++i) {
          std::memcpy(to + i * bytes, from + (i / count * e.length + at[i % count]) * bytes,
                      static_cast<size_t>(bytes));
        }
      });
}

/// Calls `body(dense self)` and writes back if self was not dense.
template <class F>
void on_dense(const Tensor& self, F&& body) {
  const Tensor work = dense_as(self, self.dtype());
  body(work);
  if (!work.is_same(self)) kernels_for(DeviceType::CPU).copy_(self, work, false);
}

/// Kernels that write in place have no meta function: what they will read is checked here.
void check_slices(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
                  std::string_view op) {
  check_index(index.dim() <= 1, op, ": Index should have dimension 1 or 0 (got ", index.dim(), ")");
  check(index.dtype() == DType::Int64 || index.dtype() == DType::Int32, op,
        ": Expected dtype int32/int64 for index, got ", index.dtype());
  check(self.dtype() == source.dtype(), op, ": self (", self.dtype(), ") and source (",
        source.dtype(), ") must have the same scalar type");
  Dims expected(self.sizes());
  if (!expected.empty()) expected[wrap_dim(dim, self.dim())] = index.numel();
  const bool fits = equal(source.sizes(), expected) ||
                    (self.dim() <= 1 && source.numel() == index.numel() && source.dim() <= 1);
  check(fits, op, ": source of shape ", source.sizes(), " does not fit self ", self.sizes(),
        " indexed by ", index.numel(), " positions along dimension ", dim, "; expected ", expected);
  check_no_internal_overlap(self);
}

/// As check_slices for gather's and scatter's element-wise indices.
void check_elements(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src,
                    std::string_view op) {
  check(is_integral(index.dtype()), op, "(): Expected an integer dtype for index, got ",
        index.dtype());
  check(self.dtype() == src.dtype(), op, "(): Expected self.dtype to be equal to src.dtype, got ",
        self.dtype(), " and ", src.dtype());
  check_no_internal_overlap(self);
  if (index.numel() == 0) return;
  // 0-d tensors count as one element of a dimension.
  const auto rank = [](const Tensor& t) { return std::max<int64_t>(t.dim(), 1); };
  check(rank(index) == rank(self) && rank(index) == rank(src),
        "Index tensor must have the same number of dimensions as ",
        index.dim() == self.dim() ? "src" : "self", " tensor (", op, ": index ", index.sizes(),
        ", self ", self.sizes(), ", src ", src.sizes(), ")");
  const int64_t d = self.dim() == 0 ? 0 : wrap_dim(dim, self.dim());
  for (int64_t k = 0; k < index.dim(); ++k) {
    const int64_t extent = index.sizes()[k], room = src.dim() == 0 ? 1 : src.sizes()[k];
    check(extent <= room && (k == d || self.dim() == 0 || extent <= self.sizes()[k]),
          "Expected index ", index.sizes(), " to be no larger than self ", self.sizes(),
          " apart from dimension ", d, " and to be no larger size than src ", src.sizes());
  }
}

void index_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
               const Scalar& alpha) {
  check_slices(self, dim, index, source, "index_add_()");
  const Tensor values = dense_as(source, source.dtype());
  on_dense(self, [&](const Tensor& work) {
    const Extents e = extents_of(work.sizes(), dim);
    const Tensor indices = checked_indices(index, e.length, dim, false, "index_add_");
    const auto* at = indices.data_as<int64_t>();
    const int64_t count = indices.numel(), size = work.itemsize();
    visit_all(work.dtype(), [&]<class T>() {
      const T scale = alpha.to<T>();
      const bool direct = work.dtype() == DTypeOf<T>::value;
      // Columns are split over threads; the order of additions to one place is that of the index.
      parallel_for(0, e.inner, std::max<int64_t>(64, kGrain / (e.outer * count + 1)),
                   [&](int64_t b, int64_t end) {
                     T x[kBlock], y[kBlock];
                     for (int64_t o = 0; o < e.outer; ++o) {
                       for (int64_t i = 0; i < count; ++i) {
                         char* target = static_cast<char*>(work.data()) +
                                        ((o * e.length + at[i]) * e.inner) * size;
                         const char* from = static_cast<const char*>(values.data()) +
                                            ((o * count + i) * e.inner) * size;
                         if (direct) {
                           auto* t = reinterpret_cast<T*>(target);
                           const auto* f = reinterpret_cast<const T*>(from);
                           for (int64_t k = b; k < end; ++k)
                             t[k] = static_cast<T>(t[k] + scale * f[k]);
                           continue;
                         }
                         for (int64_t k = b; k < end; k += kBlock) {
                           const int64_t m = std::min(kBlock, end - k);
                           load_block<T>(x, target + k * size, size, m, work.dtype(), work.dtype());
                           load_block<T>(y, from + k * size, size, m, work.dtype(), work.dtype());
                           for (int64_t j = 0; j < m; ++j)
                             x[j] = static_cast<T>(x[j] + scale * y[j]);
                           store_block<T>(target + k * size, size, x, m, work.dtype());
                         }
                       }
                     }
                   });
    });
  });
}

void index_copy(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source) {
  check_slices(self, dim, index, source, "index_copy_()");
  const Tensor values = dense_as(source, self.dtype());
  on_dense(self, [&](const Tensor& work) {
    const Extents e = extents_of(work.sizes(), dim);
    const Tensor indices = checked_indices(index, e.length, dim, false, "index_copy_");
    const auto* at = indices.data_as<int64_t>();
    const int64_t count = indices.numel(), bytes = e.inner * work.itemsize();
    for (int64_t i = 0; i < e.outer * count; ++i) {
      std::memcpy(static_cast<char*>(work.data()) + (i / count * e.length + at[i % count]) * bytes,
                  static_cast<const char*>(values.data()) + i * bytes, static_cast<size_t>(bytes));
    }
  });
}

/// Walks every element of `index`: visit(linear position in index, linear position in `target`),
/// where `target` is dense with sizes `sizes` and its coordinate along `dim` is the index's value.
template <class F>
void walk(const Tensor& indices, IntSpan sizes, int64_t dim, F&& visit, bool disjoint = false) {
  const int64_t n = indices.dim();
  const auto* at = indices.data_as<int64_t>();
  if (n == 0) {
    visit(0, at[0]);
    return;
  }
  if (indices.numel() == 0) return;
  const Dims strides = contiguous_strides(sizes);
  const int64_t d = wrap_dim(dim, n), row = indices.sizes()[n - 1];
  const int64_t rows = indices.numel() / row;
  auto walk_rows = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int64_t base = 0, rest = r;
      for (int64_t k = n - 2; k >= 0; --k) {
        if (k != d) base += rest % indices.sizes()[k] * strides[k];
        rest /= indices.sizes()[k];
      }
      const int64_t i = r * row;
      if (d == n - 1) {
        for (int64_t j = 0; j < row; ++j) visit(i + j, base + at[i + j]);
      } else {
        for (int64_t j = 0; j < row; ++j) visit(i + j, base + j + at[i + j] * strides[d]);
      }
    }
  };
  // Only where no two visits write one place may threads share the work.
  if (disjoint)
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / row), walk_rows);
  else
    walk_rows(0, rows);
}

template <class F>
void by_size(int64_t size, F&& f) {
  switch (size) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    default:
      return f.template operator()<uint64_t>();
  }
}

int64_t length_of(const Tensor& t, int64_t dim) { return t.dim() == 0 ? 1 : t.size(dim); }

void gather(const Tensor& out, const Tensor& self, int64_t dim, const Tensor& index, bool) {
  const Tensor input = dense_as(self, self.dtype());
  const Tensor indices =
      checked_indices(index, length_of(self, dim), dim, false, "gather", ErrorKind::Runtime);
  by_size(out.itemsize(), [&]<class T>() {
    const auto* from = input.data_as<T>();
    auto* to = out.data_as<T>();
    walk(
        indices, input.sizes(), dim, [&](int64_t i, int64_t position) { to[i] = from[position]; },
        true);
  });
}

/// The part of `src` that `index` covers, dense.
Tensor covered(const Tensor& src, const Tensor& index, DType dtype) {
  if (src.dim() == 0) return dense_as(src, dtype);
  return dense_as(make_view(src, index.sizes(), src.strides(), src.storage_offset()), dtype);
}

void scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  check_elements(self, dim, index, src, "scatter");
  if (index.numel() == 0) return;
  const Tensor values = covered(src, index, self.dtype());
  const Tensor indices =
      checked_indices(index, length_of(self, dim), dim, false, "scatter_", ErrorKind::Runtime);
  on_dense(self, [&](const Tensor& work) {
    by_size(work.itemsize(), [&]<class T>() {
      const auto* from = values.data_as<T>();
      auto* to = work.data_as<T>();
      walk(indices, work.sizes(), dim,
           [&](int64_t i, int64_t position) { to[position] = from[i]; });
    });
  });
}

void scatter_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  check_elements(self, dim, index, src, "scatter_add");
  if (index.numel() == 0) return;
  const Tensor values = covered(src, index, self.dtype());
  const Tensor indices =
      checked_indices(index, length_of(self, dim), dim, false, "scatter_add_", ErrorKind::Runtime);
  on_dense(self, [&](const Tensor& work) {
    const int64_t size = work.itemsize();
    visit_all(work.dtype(), [&]<class T>() {
      walk(indices, work.sizes(), dim, [&](int64_t i, int64_t position) {
        T x, y;
        char* target = static_cast<char*>(work.data()) + position * size;
        load_block<T>(&x, target, size, 1, work.dtype(), work.dtype());
        load_block<T>(&y, static_cast<const char*>(values.data()) + i * size, size, 1, work.dtype(),
                      work.dtype());
        x = static_cast<T>(x + y);
        store_block<T>(target, size, &x, 1, work.dtype());
      });
    });
  });
}

void wrap_index(const Tensor& out, const Tensor& index, int64_t dim, int64_t size) {
  const Tensor from = dense_as(index, DType::Int64);
  const auto* values = from.data_as<int64_t>();
  auto* to = out.data_as<int64_t>();
  for (int64_t i = 0; i < from.numel(); ++i) {
    const int64_t v = values[i];
    check_index(v >= -size && v < size, "index ", v, " is out of bounds for dimension ", dim,
                " with size ", size);
    to[i] = v < 0 ? v + size : v;
  }
}

/// Row i of `out` = the coordinates of the i-th true element of the dense `mask`.
void nonzero(const Tensor& out, const Tensor& mask) {
  const auto* set = mask.data_as<bool>();
  auto* to = out.data_as<int64_t>();
  const int64_t n = mask.dim();
  for (int64_t i = 0; i < mask.numel(); ++i) {
    if (!set[i]) continue;
    int64_t rest = i;
    for (int64_t d = n - 1; d >= 0; --d) {
      to[d] = rest % mask.sizes()[d];
      rest /= mask.sizes()[d];
    }
    to += n;
  }
}

void cat(const Tensor& out, TensorSpan tensors, int64_t dim) {
  int64_t start = 0;
  for (const Tensor& t : tensors) {
    if (t.dim() == 1 && t.numel() == 0) continue;
    const int64_t d = wrap_dim(dim, out.dim());
    Dims sizes(out.sizes());
    sizes[d] = t.sizes()[d];
    const Tensor part =
        make_view(out, sizes, out.strides(), out.storage_offset() + start * out.strides()[d]);
    kernels_for(DeviceType::CPU).copy_(part, t, false);
    start += t.sizes()[d];
  }
}

const RegisterCpu registered([](KernelTable& t) {
  t.index_select = index_select;
  t.index_add_ = index_add;
  t.index_copy_ = index_copy;
  t.gather = gather;
  t._scatter_ = scatter;
  t.scatter_add_ = scatter_add;
  t._wrap_index = wrap_index;
  t._nonzero_ = nonzero;
  t.cat = cat;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
