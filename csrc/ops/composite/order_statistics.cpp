// Extremes, medians and differences made of other reductions and of sort.
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

/// One entry of a dimension as (values, indices), with or without that dimension, in memory of
/// their own.
std::tuple<Tensor, Tensor> pick(const Tensor& values, const Tensor& indices, int64_t dim,
                                int64_t at, bool keepdim) {
  const auto part = [&](const Tensor& t) {
    return ops::contiguous(keepdim ? ops::slice(t, dim, at, at + 1, 1) : ops::select(t, dim, at),
                           std::nullopt);
  };
  return {part(values), part(indices)};
}

}  // namespace

std::tuple<Tensor, Tensor> aminmax(const Tensor& self, std::optional<int64_t> dim, bool keepdim) {
  if (dim) {
    const int64_t one[] = {*dim};
    return {ops::amin(self, one, keepdim), ops::amax(self, one, keepdim)};
  }
  check(self.numel() > 0,
        "aminmax(): cannot compute aminmax over an empty dimension as the operation has no "
        "identity.");
  return {ops::amin(self, {}, keepdim), ops::amax(self, {}, keepdim)};
}

Tensor nanmean(const Tensor& self, std::optional<IntSpan> dim, bool keepdim,
               std::optional<DType> dtype) {
  check(is_floating(self.dtype()),
        "nanmean(): expected input to have floating point dtype but got ", self.dtype());
  const Tensor present = ops::_to_dtype(ops::eq(self, self), self.dtype());
  const Tensor count = ops::sum_dim(present, dim, keepdim, dtype);
  return ops::div(ops::nansum(self, dim, keepdim, dtype), count);
}

Tensor dist(const Tensor& self, const Tensor& other, const Scalar& p) {
  return ops::linalg_vector_norm(ops::sub(self, other, Scalar(1)), p, std::nullopt, false,
                                 std::nullopt);
}

Tensor diff(const Tensor& self, int64_t n, int64_t dim, const Tensor& prepend,
            const Tensor& append) {
  check(self.dim() > 0, "diff expects input to be at least one-dimensional");
  check(n >= 0, "order must be non-negative but got ", n);
  const int64_t d = wrap_dim(dim, self.dim());
  std::vector<Tensor> parts;
  if (prepend.defined()) parts.push_back(prepend);
  parts.push_back(self);
  if (append.defined()) parts.push_back(append);
  Tensor out = parts.size() == 1 ? self : ops::cat(parts, d);
  if (n == 0) return ops::clone(self, std::nullopt);
  for (int64_t i = 0, length = out.size(d); i < std::min(n, length); ++i) {
    const int64_t size = out.size(d);
    const Tensor later = ops::slice(out, d, 1, size, 1),
                 earlier = ops::slice(out, d, 0, size - 1, 1);
    out = out.dtype() == DType::Bool ? ops::logical_xor(later, earlier)
                                     : ops::sub(later, earlier, Scalar(1));
  }
  return out;
}

std::tuple<Tensor, Tensor> kthvalue(const Tensor& self, int64_t k, int64_t dim, bool keepdim) {
  const int64_t size = self.dim() == 0 ? 1 : self.size(dim);
  check(size > 0 || self.numel() > 0, "kthvalue(): Expected reduction dim ", dim,
        " to have non-zero size.");
  check(k >= 1 && k <= size, "kthvalue(): selected number k out of range for dimension ", dim);
  const auto [values, indices] = ops::sort(self, dim, false, true);
  if (self.dim() == 0) return {values, indices};
  return pick(values, indices, wrap_dim(dim, self.dim()), k - 1, keepdim);
}

std::tuple<Tensor, Tensor> median_dim(const Tensor& self, int64_t dim, bool keepdim) {
  const int64_t d = wrap_dim(dim, self.dim());
  if (self.dim() == 0) return ops::sort(self, 0, false, true);
  const int64_t size = self.size(d);
  check_index(size > 0, "median(): Expected reduction dim ", d, " to have non-zero size.");
  const auto [values, indices] = ops::sort(self, d, false, true);
  if (!is_floating(self.dtype())) return pick(values, indices, d, (size - 1) / 2, keepdim);
  // nan sorts last; a lane that has any answers with its first one.
  const int64_t one[] = {d};
  const Tensor first_nan = ops::sum_dim(ops::eq(values, values), one, true, DType::Int64);
  const Tensor middle =
      ops::full(first_nan.sizes(), Scalar((size - 1) / 2), DType::Int64, self.device());
  const Tensor at = ops::where(ops::lt(first_nan, wrapped_scalar(Scalar(size))), first_nan, middle);
  const Tensor v = ops::gather(values, d, at, false), i = ops::gather(indices, d, at, false);
  if (keepdim) return {v, i};
  return {ops::select(v, d, 0), ops::select(i, d, 0)};
}

Tensor median(const Tensor& self) {
  if (self.numel() == 0) {
    check(is_floating(self.dtype()), "median() of an empty ", self.dtype(), " tensor has no value");
    return ops::full({}, Scalar(std::numeric_limits<double>::quiet_NaN()), self.dtype(),
                     self.device());
  }
  return std::get<0>(ops::median_dim(ops::reshape(self, Dims{-1}), 0, false));
}

Tensor bucketize(const Tensor& self, const Tensor& boundaries, bool out_int32, bool right) {
  check(boundaries.dim() == 1, "bucketize: boundaries tensor must be 1 dimension, but got dim(",
        boundaries.dim(), ")");
  return ops::searchsorted(boundaries, self, out_int32, right, std::nullopt, Tensor());
}

}  // namespace vt::composite

namespace vt::meta {

std::tuple<Tensor, Tensor> cummax(const Tensor& self, int64_t dim) {
  wrap_dim(dim, self.dim());
  return {empty(self.sizes(), self.dtype(), self.device()),
          empty(self.sizes(), DType::Int64, self.device())};
}
Tensor searchsorted(const Tensor& sorted_sequence, const Tensor& self, bool out_int32, bool right,
                    std::optional<std::string_view> side, const Tensor& sorter) {
  check(!side || *side == "left" || *side == "right",
        "torch.searchsorted(): side can only be 'left' or 'right' but got ", side.value_or(""));
  check(!(right && side == "left"),
        "torch.searchsorted(): side and right can't be set to opposites, got side of left while "
        "right was True");
  check(sorted_sequence.dim() > 0,
        "torch.searchsorted(): the boundaries tensor should have positive dimension, but got a "
        "0-d tensor");
  check(self.impl()->wrapped_number || self.dtype() == sorted_sequence.dtype(),
        "torch.searchsorted(): boundary tensor and input value tensor should have same dtype, but "
        "got boundary tensor dtype ",
        sorted_sequence.dtype(), " and input value tensor dtype ", self.dtype());
  check(self.dim() > 0 || sorted_sequence.dim() == 1,
        "torch.searchsorted(): input value can be a scalar only when boundaries tensor dimension "
        "is 1, but got ",
        sorted_sequence.sizes());
  if (sorted_sequence.dim() > 1) {
    const auto lead = sorted_sequence.sizes().first(sorted_sequence.sizes().size() - 1);
    check(self.dim() == sorted_sequence.dim() &&
              vt::equal(lead, self.sizes().first(self.sizes().size() - 1)),
          "torch.searchsorted(): boundaries tensor should be 1 dimension or the first N-1 "
          "dimensions of boundaries tensor and input value tensor must match, but we got "
          "boundaries tensor ",
          sorted_sequence.sizes(), " and input value tensor ", self.sizes());
  }
  if (sorter.defined()) {
    check(vt::equal(sorter.sizes(), sorted_sequence.sizes()),
          "torch.searchsorted(): boundary and sorter must have the same size, but got boundary "
          "tensor ",
          sorted_sequence.sizes(), " and got sorter tensor ", sorter.sizes());
    check(sorter.dtype() == DType::Int64,
          "torch.searchsorted(): sorter must be a tensor of long dtype but got dtype ",
          sorter.dtype());
  }
  check(!out_int32 || sorted_sequence.size(-1) < (int64_t{1} << 31),
        "torch.searchsorted(): the size of boundaries' last dimension should be less than 2^31");
  return empty(self.sizes(), out_int32 ? DType::Int32 : DType::Int64, sorted_sequence.device());
}
std::tuple<Tensor, Tensor> cummin(const Tensor& self, int64_t dim) { return cummax(self, dim); }

}  // namespace vt::meta
