// Reductions made of others.
#include <cmath>
#include <limits>

#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor number(double value) { return wrapped_scalar(Scalar(value)); }

int64_t count(const Tensor& self, std::optional<IntSpan> dim) {
  if (!dim || dim->empty()) return self.numel();
  int64_t n = 1;
  for (const int64_t d : *dim) n *= self.dim() == 0 ? 1 : self.size(d);
  return n;
}

/// 16-bit floats as float32: their squares and powers need its range.
Tensor widened(const Tensor& t) {
  return is_reduced_float(t.dtype()) ? ops::_to_dtype(t, DType::Float32) : t;
}
Tensor rounded(const Tensor& t, DType dtype) {
  return t.dtype() == dtype ? t : ops::_to_dtype(t, dtype);
}

/// Two passes: the mean first, then the squares around it. In float32 of 16-bit floats.
Tensor variance(const Tensor& self, std::optional<IntSpan> dim, double correction, bool keepdim) {
  check(is_floating(self.dtype()), "std and var only support floating point dtypes, got ",
        self.dtype());
  const Tensor x = widened(self);
  const Tensor centered = ops::sub(x, ops::mean_dim(x, dim, true, std::nullopt), Scalar(1));
  const double divisor = std::max(static_cast<double>(count(self, dim)) - correction, 0.0);
  return ops::div(ops::sum_dim(ops::mul(centered, centered), dim, keepdim, std::nullopt),
                  number(divisor));
}
/// sqrt whose gradient is 0, not nan, where the root is 0 (as torch defines it for norms and std).
Tensor root(const Tensor& squares) {
  if (!squares.impl()->requires_grad && !squares.impl()->autograd) return ops::sqrt(squares);
  const Tensor zero = ops::eq(squares, number(0));
  return ops::masked_fill(ops::sqrt(ops::masked_fill(squares, zero, number(1))), zero, number(0));
}
Tensor variance_of(const Tensor& self, std::optional<IntSpan> dim, double correction,
                   bool keepdim) {
  return rounded(variance(self, dim, correction, keepdim), self.dtype());
}
Tensor deviation_of(const Tensor& self, std::optional<IntSpan> dim, double correction,
                    bool keepdim) {
  return rounded(root(variance(self, dim, correction, keepdim)), self.dtype());
}
double correction_of(const std::optional<Scalar>& correction) {
  return correction ? correction->to_double() : 1.0;
}

}  // namespace

Tensor sum(const Tensor& self, std::optional<DType> dtype) {
  return ops::sum_dim(self, std::nullopt, false, dtype);
}
Tensor mean(const Tensor& self, std::optional<DType> dtype) {
  return ops::mean_dim(self, std::nullopt, false, dtype);
}
Tensor any(const Tensor& self) { return ops::any_dim(self, std::nullopt, false); }
Tensor all(const Tensor& self) { return ops::all_dim(self, std::nullopt, false); }
Tensor max(const Tensor& self) {
  check(self.numel() > 0,
        "max(): Expected reduction dim to be specified for input.numel() == 0. Specify the "
        "reduction dim with the 'dim' argument.");
  return ops::amax(self, {}, false);
}
Tensor min(const Tensor& self) {
  check(self.numel() > 0,
        "min(): Expected reduction dim to be specified for input.numel() == 0. Specify the "
        "reduction dim with the 'dim' argument.");
  return ops::amin(self, {}, false);
}
Tensor max_other(const Tensor& self, const Tensor& other) { return ops::maximum(self, other); }
Tensor min_other(const Tensor& self, const Tensor& other) { return ops::minimum(self, other); }

Tensor var(const Tensor& self, bool unbiased) {
  return variance_of(self, std::nullopt, unbiased ? 1 : 0, false);
}
Tensor var_correction(const Tensor& self, std::optional<IntSpan> dim,
                      std::optional<Scalar> correction, bool keepdim) {
  return variance_of(self, dim, correction_of(correction), keepdim);
}
Tensor var_dim(const Tensor& self, std::optional<IntSpan> dim, bool unbiased, bool keepdim) {
  return variance_of(self, dim, unbiased ? 1 : 0, keepdim);
}
Tensor std(const Tensor& self, bool unbiased) {
  return deviation_of(self, std::nullopt, unbiased ? 1 : 0, false);
}
Tensor std_correction(const Tensor& self, std::optional<IntSpan> dim,
                      std::optional<Scalar> correction, bool keepdim) {
  return deviation_of(self, dim, correction_of(correction), keepdim);
}
Tensor std_dim(const Tensor& self, std::optional<IntSpan> dim, bool unbiased, bool keepdim) {
  return deviation_of(self, dim, unbiased ? 1 : 0, keepdim);
}
std::tuple<Tensor, Tensor> var_mean(const Tensor& self, std::optional<IntSpan> dim,
                                    std::optional<Scalar> correction, bool keepdim) {
  return {variance_of(self, dim, correction_of(correction), keepdim),
          ops::mean_dim(self, dim, keepdim, std::nullopt)};
}
std::tuple<Tensor, Tensor> std_mean(const Tensor& self, std::optional<IntSpan> dim,
                                    std::optional<Scalar> correction, bool keepdim) {
  return {deviation_of(self, dim, correction_of(correction), keepdim),
          ops::mean_dim(self, dim, keepdim, std::nullopt)};
}

std::tuple<Tensor, Tensor> var_mean_unbiased(const Tensor& self, bool unbiased) {
  return {ops::var(self, unbiased), ops::mean(self, std::nullopt)};
}
std::tuple<Tensor, Tensor> var_mean_dim(const Tensor& self, std::optional<IntSpan> dim,
                                        bool unbiased, bool keepdim) {
  return ops::var_mean(self, dim, Scalar(unbiased ? 1 : 0), keepdim);
}
std::tuple<Tensor, Tensor> std_mean_unbiased(const Tensor& self, bool unbiased) {
  return {ops::std(self, unbiased), ops::mean(self, std::nullopt)};
}
std::tuple<Tensor, Tensor> std_mean_dim(const Tensor& self, std::optional<IntSpan> dim,
                                        bool unbiased, bool keepdim) {
  return ops::std_mean(self, dim, Scalar(unbiased ? 1 : 0), keepdim);
}

Tensor logsumexp(const Tensor& self, IntSpan dim, bool keepdim) {
  const Tensor x = is_floating(self.dtype()) ? self : ops::_to_dtype(self, default_dtype());
  // The logarithm of nothing summed: -inf for each of what is left.
  if (x.numel() == 0) return ops::log(ops::sum_dim(ops::exp(x), dim, keepdim, std::nullopt));
  // The shift only guards the range; it carries no gradient.
  const Tensor top = ops::detach(ops::amax(x, dim, true));
  const Tensor shift = ops::_where(ops::isfinite(top), top,
                                   ops::zeros_like(top, std::nullopt, std::nullopt, std::nullopt));
  const Tensor total =
      ops::log(ops::sum_dim(ops::exp(ops::sub(x, shift, Scalar(1))), dim, keepdim, std::nullopt));
  return ops::add(total, keepdim ? shift : ops::reshape(shift, total.sizes()), Scalar(1));
}

Tensor linalg_vector_norm(const Tensor& self, const Scalar& ord, std::optional<IntSpan> dim,
                          bool keepdim, std::optional<DType> dtype) {
  check(is_floating(dtype.value_or(self.dtype())),
        "linalg.vector_norm: Expected a floating point tensor as input. Got ", self.dtype());
  const Tensor x = rounded(self, dtype.value_or(self.dtype()));
  const double p = ord.to_double();
  if (std::isinf(p)) {
    const Tensor magnitude = ops::abs(x);
    return p > 0 ? ops::amax(magnitude, dim.value_or(IntSpan()), keepdim)
                 : ops::amin(magnitude, dim.value_or(IntSpan()), keepdim);
  }
  if (p == 0) {
    // A count: its gradient is 0 everywhere, which _where has for the value it never takes.
    const Tensor always = ops::ones(x.sizes(), DType::Bool, x.device());
    const Tensor counted = ops::_where(always, ops::_to_dtype(ops::ne(x, number(0)), x.dtype()), x);
    return ops::sum_dim(counted, dim, keepdim, std::nullopt);
  }
  if (p == 1) return ops::sum_dim(ops::abs(x), dim, keepdim, std::nullopt);
  const Tensor wide = widened(x);
  const Tensor length =
      p == 2
          ? root(ops::sum_dim(ops::mul(wide, wide), dim, keepdim, std::nullopt))
          : ops::pow(ops::sum_dim(ops::pow(ops::abs(wide), number(p)), dim, keepdim, std::nullopt),
                     number(1.0 / p));
  return rounded(length, x.dtype());
}
Tensor norm(const Tensor& self, std::optional<Scalar> p, std::optional<IntSpan> dim, bool keepdim,
            std::optional<DType> dtype) {
  return ops::linalg_vector_norm(self, p.value_or(Scalar(2)), dim, keepdim, dtype);
}
Tensor norm_named(const Tensor& self, std::string_view p, std::optional<IntSpan> dim, bool keepdim,
                  std::optional<DType> dtype) {
  if (p == "nuc") {
    fail(ErrorKind::NotImplemented,
         "norm: the nuclear norm needs singular values, which are not here; use p='fro' or a "
         "number");
  }
  check_value(p == "fro", "norm: p must be 'fro' or a number, got '", p, "'");
  return ops::linalg_vector_norm(self, Scalar(2), dim, keepdim, dtype);
}
Tensor nansum(const Tensor& self, std::optional<IntSpan> dim, bool keepdim,
              std::optional<DType> dtype) {
  if (!is_floating(self.dtype())) return ops::sum_dim(self, dim, keepdim, dtype);
  return ops::sum_dim(ops::masked_fill(self, ops::isnan(self), number(0)), dim, keepdim, dtype);
}

Tensor argsort(const Tensor& self, int64_t dim, bool descending, bool stable) {
  return std::get<1>(ops::sort(self, dim, descending, stable));
}
std::tuple<Tensor, Tensor> topk(const Tensor& self, int64_t k, int64_t dim, bool largest, bool) {
  const int64_t size = self.dim() == 0 ? 1 : self.size(dim);
  check(k >= 0 && k <= size, "selected index k out of range (k = ", k, ", dimension ", dim, " of ",
        self.sizes(), ")");
  auto [values, indices] = ops::sort(self, dim, largest, true);
  if (self.dim() == 0) return {values, indices};
  // In memory of their own: the whole of what was sorted need not live on.
  return {ops::contiguous(ops::slice(values, dim, 0, k, 1), std::nullopt),
          ops::contiguous(ops::slice(indices, dim, 0, k, 1), std::nullopt)};
}

std::tuple<Tensor, Tensor, Tensor> unique_consecutive(const Tensor& self, bool, bool) {
  const Tensor flat = ops::reshape(self, Dims{-1});
  const int64_t n = flat.numel();
  if (n == 0) {
    const Tensor none = vt::empty(Dims{0}, DType::Int64, self.device());
    return {flat, none, none};
  }
  const Tensor first = ops::ones(Dims{1}, DType::Bool, self.device());
  const Tensor parts[] = {
      first, ops::ne(ops::slice(flat, 0, 1, std::nullopt, 1), ops::slice(flat, 0, 0, n - 1, 1))};
  const Tensor starts = ops::cat(parts, 0);
  const Tensor inverse = ops::sub(
      ops::cumsum(ops::_to_dtype(starts, DType::Int64), 0, std::nullopt), number(1), Scalar(1));
  const Tensor where = ops::reshape(ops::nonzero(starts), Dims{-1});
  const Tensor values = ops::index_select(flat, 0, where);
  const Tensor ids = ops::_to_dtype(inverse, DType::Int64);
  const Tensor counts =
      ops::index_add(ops::zeros(values.sizes(), DType::Int64, self.device()), 0, ids,
                     ops::ones(Dims{n}, DType::Int64, self.device()), Scalar(1));
  return {values, ops::reshape(ids, self.sizes()), counts};
}
std::tuple<Tensor, Tensor, Tensor> _unique(const Tensor& self) {
  const auto [sorted, order] = ops::sort(ops::reshape(self, Dims{-1}), 0, false, true);
  const auto [values, ranks, counts] = ops::unique_consecutive(sorted, true, true);
  const Tensor inverse =
      ops::scatter(ops::zeros(order.sizes(), DType::Int64, self.device()), 0, order, ranks);
  return {values, ops::reshape(inverse, self.sizes()), counts};
}
Tensor bincount(const Tensor& self, const Tensor& weights, int64_t minlength) {
  check(self.dim() == 1 && is_integral(self.dtype()),
        "bincount only supports 1-d non-negative integral inputs.");
  check(minlength >= 0, "minlength should be >= 0");
  if (self.numel() == 0) return ops::zeros(Dims{minlength}, DType::Int64, self.device());
  check(ops::min(self).item().to_int() >= 0,
        "bincount only supports 1-d non-negative integral inputs.");
  const int64_t bins = std::max(ops::max(self).item().to_int() + 1, minlength);
  const Tensor index = ops::_to_dtype(self, DType::Int64);
  Tensor ones = weights.defined() ? weights : ops::ones(self.sizes(), DType::Int64, self.device());
  check(vt::equal(ones.sizes(), self.sizes()), "bincount: weights of shape ", ones.sizes(),
        " should have the shape of the input, ", self.sizes());
  // Weights are summed as float32 or, of any other dtype, as float64.
  if (weights.defined() && ones.dtype() != DType::Float32)
    ones = ops::_to_dtype(ones, DType::Float64);
  return ops::index_add(ops::zeros(Dims{bins}, ones.dtype(), self.device()), 0, index, ones,
                        Scalar(1));
}
}  // namespace vt::composite
