// Output shapes and dtypes of reductions and scans.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

uint64_t mask_of(std::optional<IntSpan> dims, int64_t ndim, std::string_view op) {
  if (!dims || dims->empty()) return ~uint64_t{0};
  uint64_t mask = 0;
  for (const int64_t d : *dims) {
    const uint64_t bit = uint64_t{1} << wrap_dim(d, ndim);
    check((mask & bit) == 0, op, ": dim ", d, " appears multiple times in the list of dims");
    mask |= bit;
  }
  return mask;
}

Dims reduced_shape(const Tensor& self, uint64_t mask, bool keepdim) {
  Dims shape;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (!(mask >> d & 1))
      shape.push_back(self.sizes()[d]);
    else if (keepdim)
      shape.push_back(1);
  }
  return shape;
}

Tensor reduced(const Tensor& self, uint64_t mask, bool keepdim, DType dtype) {
  return empty(reduced_shape(self, mask, keepdim), dtype, self.device());
}
DType sum_dtype(const Tensor& self, std::optional<DType> dtype) {
  return dtype.value_or(is_integral(self.dtype(), true) ? DType::Int64 : self.dtype());
}
/// Extremes of nothing have no value.
void check_not_empty(const Tensor& self, uint64_t mask, std::string_view op,
                     ErrorKind kind = ErrorKind::Index) {
  for (int64_t d = 0; d < self.dim(); ++d) {
    if ((mask >> d & 1) && self.sizes()[d] == 0)
      fail(kind, op, "(): Expected reduction dim ", d, " to have non-zero size.");
  }
}
uint64_t one(int64_t dim, const Tensor& self) { return uint64_t{1} << wrap_dim(dim, self.dim()); }

std::tuple<Tensor, Tensor> extremum(const Tensor& self, int64_t dim, bool keepdim,
                                    std::string_view op) {
  const uint64_t mask = one(dim, self);
  check_not_empty(self, mask, op);
  return {reduced(self, mask, keepdim, self.dtype()), reduced(self, mask, keepdim, DType::Int64)};
}

Tensor arg(const Tensor& self, std::optional<int64_t> dim, bool keepdim, std::string_view op) {
  const uint64_t mask = dim ? one(*dim, self) : ~uint64_t{0};
  if (!dim)
    check_index(self.numel() > 0, op,
                "(): Expected reduction dim to be specified for input.numel() == 0. Specify the "
                "reduction dim with the 'dim' argument.");
  check_not_empty(self, mask, op);
  return reduced(self, mask, keepdim, DType::Int64);
}

}  // namespace

Tensor sum_dim(const Tensor& self, std::optional<IntSpan> dim, bool keepdim,
               std::optional<DType> dtype) {
  return reduced(self, mask_of(dim, self.dim(), "sum"), keepdim, sum_dtype(self, dtype));
}
Tensor mean_dim(const Tensor& self, std::optional<IntSpan> dim, bool keepdim,
                std::optional<DType> dtype) {
  const DType type = dtype.value_or(self.dtype());
  check(is_floating(type),
        "mean(): could not infer output dtype. Input dtype must be either a floating point or "
        "complex dtype. Got: ",
        type);
  return reduced(self, mask_of(dim, self.dim(), "mean"), keepdim, type);
}
Tensor prod(const Tensor& self, std::optional<DType> dtype) {
  return empty({}, sum_dtype(self, dtype), self.device());
}
Tensor prod_dim(const Tensor& self, int64_t dim, bool keepdim, std::optional<DType> dtype) {
  return reduced(self, one(dim, self), keepdim, sum_dtype(self, dtype));
}
Tensor amax(const Tensor& self, IntSpan dim, bool keepdim) {
  const uint64_t mask = mask_of(dim, self.dim(), "amax");
  check_not_empty(self, mask, "amax", dim.empty() ? ErrorKind::Runtime : ErrorKind::Index);
  return reduced(self, mask, keepdim, self.dtype());
}
Tensor amin(const Tensor& self, IntSpan dim, bool keepdim) {
  const uint64_t mask = mask_of(dim, self.dim(), "amin");
  check_not_empty(self, mask, "amin", dim.empty() ? ErrorKind::Runtime : ErrorKind::Index);
  return reduced(self, mask, keepdim, self.dtype());
}
std::tuple<Tensor, Tensor> max_dim(const Tensor& self, int64_t dim, bool keepdim) {
  return extremum(self, dim, keepdim, "max");
}
std::tuple<Tensor, Tensor> min_dim(const Tensor& self, int64_t dim, bool keepdim) {
  return extremum(self, dim, keepdim, "min");
}
Tensor argmax(const Tensor& self, std::optional<int64_t> dim, bool keepdim) {
  return arg(self, dim, keepdim, "argmax");
}
Tensor argmin(const Tensor& self, std::optional<int64_t> dim, bool keepdim) {
  return arg(self, dim, keepdim, "argmin");
}
namespace {
/// any and all take an empty list of dimensions at its word: each element is tested alone.
uint64_t tested(std::optional<IntSpan> dim, int64_t ndim, std::string_view op) {
  return dim && dim->empty() ? 0 : mask_of(dim, ndim, op);
}
}  // namespace
Tensor any_dim(const Tensor& self, std::optional<IntSpan> dim, bool keepdim) {
  return reduced(self, tested(dim, self.dim(), "any"), keepdim,
                 self.dtype() == DType::UInt8 ? DType::UInt8 : DType::Bool);
}
Tensor all_dim(const Tensor& self, std::optional<IntSpan> dim, bool keepdim) {
  return reduced(self, tested(dim, self.dim(), "all"), keepdim,
                 self.dtype() == DType::UInt8 ? DType::UInt8 : DType::Bool);
}
Tensor count_nonzero(const Tensor& self, std::optional<IntSpan> dim) {
  return reduced(self, mask_of(dim, self.dim(), "count_nonzero"), false, DType::Int64);
}
Tensor cumsum(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  wrap_dim(dim, self.dim());
  return empty(self.sizes(), sum_dtype(self, dtype), self.device());
}
Tensor cumprod(const Tensor& self, int64_t dim, std::optional<DType> dtype) {
  return cumsum(self, dim, dtype);
}
std::tuple<Tensor, Tensor> sort(const Tensor& self, int64_t dim, bool, bool) {
  wrap_dim(dim, self.dim());
  return {empty(self.sizes(), self.dtype(), self.device()),
          empty(self.sizes(), DType::Int64, self.device())};
}

}  // namespace vt::meta
