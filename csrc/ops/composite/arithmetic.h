// Operators on tensors for the bodies of composite ops: `a * b + c` reads as the formula does.
// Every one is an op call, recorded and differentiated as such.
#pragma once

#include "vt/ops.h"

namespace vt::composite::arithmetic {

inline Tensor operator+(const Tensor& a, const Tensor& b) { return ops::add(a, b, Scalar(1)); }
inline Tensor operator-(const Tensor& a, const Tensor& b) { return ops::sub(a, b, Scalar(1)); }
inline Tensor operator*(const Tensor& a, const Tensor& b) { return ops::mul(a, b); }
inline Tensor operator/(const Tensor& a, const Tensor& b) { return ops::div(a, b); }
inline Tensor operator-(const Tensor& a) { return ops::neg(a); }
inline Tensor operator+(const Tensor& a, double b) {
  return ops::add(a, wrapped_scalar(Scalar(b)), Scalar(1));
}
inline Tensor operator-(const Tensor& a, double b) {
  return ops::sub(a, wrapped_scalar(Scalar(b)), Scalar(1));
}
inline Tensor operator*(const Tensor& a, double b) {
  return ops::mul(a, wrapped_scalar(Scalar(b)));
}
inline Tensor operator/(const Tensor& a, double b) {
  return ops::div(a, wrapped_scalar(Scalar(b)));
}
inline Tensor operator-(double a, const Tensor& b) {
  return ops::sub(wrapped_scalar(Scalar(a)), b, Scalar(1));
}

inline Tensor sum(const Tensor& t) { return ops::sum(t, std::nullopt); }
inline Tensor sum(const Tensor& t, IntSpan dims, bool keepdim) {
  return ops::sum_dim(t, dims, keepdim, std::nullopt);
}
inline Tensor mean(const Tensor& t) { return ops::mean(t, std::nullopt); }
inline Tensor mean(const Tensor& t, IntSpan dims, bool keepdim) {
  return ops::mean_dim(t, dims, keepdim, std::nullopt);
}

/// The last `n` dimensions.
inline Dims last_dims(const Tensor& t, size_t n) {
  Dims dims;
  for (int64_t d = t.dim() - static_cast<int64_t>(n); d < t.dim(); ++d) dims.push_back(d);
  return dims;
}

/// A loss as its `reduction` wants it: 0 every element, 1 the mean, 2 the sum.
inline Tensor reduced(const Tensor& loss, int64_t reduction) {
  return reduction == 0 ? loss : reduction == 1 ? mean(loss) : sum(loss);
}

}  // namespace vt::composite::arithmetic
