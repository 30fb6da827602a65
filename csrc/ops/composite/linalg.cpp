// Products of any rank in terms of mm, bmm, mv and dot.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor number(const Scalar& s) { return wrapped_scalar(s); }
/// A factor as an element of `t`: integers are scaled by integers, as the fused kernels do.
Scalar as_element(const Tensor& t, const Scalar& s) {
  if (t.dtype() == DType::Bool) return s.to_bool();
  return is_integral(t.dtype()) ? Scalar(s.to_int()) : s;
}
Tensor scale(const Tensor& t, const Scalar& factor) {
  const Scalar s = as_element(t, factor);
  return s.to_double() == 1 ? t : ops::mul(t, number(s));
}
/// beta · self + product; self counts for nothing, nan included, where beta is 0.
Tensor plus_scaled(const Tensor& self, const Scalar& beta, const Tensor& product) {
  return as_element(self, beta).to_double() == 0 ? product
                                                 : ops::add(scale(self, beta), product, Scalar(1));
}

}  // namespace

Tensor outer(const Tensor& self, const Tensor& vec2) {
  check(self.dim() == 1, "outer: Expected 1-D argument self, but got ", self.dim(), "-D");
  check(vec2.dim() == 1, "outer: Expected 1-D argument vec2, but got ", vec2.dim(), "-D");
  return ops::mul(ops::unsqueeze(self, 1), ops::unsqueeze(vec2, 0));
}

Tensor vdot(const Tensor& self, const Tensor& other) { return ops::dot(self, other); }

Tensor inner(const Tensor& self, const Tensor& other) {
  if (self.dim() == 0 || other.dim() == 0) return ops::mul(self, other);
  const int64_t a = self.size(-1), b = other.size(-1);
  check(a == b, "inner() the last dimension must match on both input tensors but got shapes ",
        self.sizes(), " and ", other.sizes());
  return ops::tensordot(self, other, Dims{-1}, Dims{-1});
}

Tensor addr(const Tensor& self, const Tensor& vec1, const Tensor& vec2, const Scalar& beta,
            const Scalar& alpha) {
  return plus_scaled(self, beta, scale(ops::outer(vec1, vec2), alpha));
}

Tensor _addmm_activation(const Tensor& self, const Tensor& mat1, const Tensor& mat2,
                         const Scalar& beta, const Scalar& alpha, bool use_gelu) {
  const Tensor sum = ops::addmm(self, mat1, mat2, beta, alpha);
  return use_gelu ? ops::gelu(sum, "tanh") : ops::relu(sum);
}

Tensor addbmm(const Tensor& self, const Tensor& batch1, const Tensor& batch2, const Scalar& beta,
              const Scalar& alpha) {
  // One matrix product over batch and inner dimension together: sums are rounded once.
  check(batch1.dim() == 3 && batch2.dim() == 3,
        "addbmm: batch1 and batch2 must be 3-D tensors, got ", batch1.sizes(), " and ",
        batch2.sizes());
  const int64_t b = batch1.sizes()[0], n = batch1.sizes()[1], k = batch1.sizes()[2];
  check(batch2.sizes()[0] == b && batch2.sizes()[1] == k,
        "addbmm: Incompatible matrix sizes for bmm (", batch1.sizes(), " and ", batch2.sizes(),
        ")");
  const Tensor left = ops::reshape(ops::permute(batch1, Dims{1, 0, 2}), Dims{n, b * k});
  const Tensor right = ops::reshape(batch2, Dims{b * k, batch2.sizes()[2]});
  return plus_scaled(self, beta, scale(ops::mm(left, right), alpha));
}

Tensor matmul(const Tensor& self, const Tensor& other) {
  const int64_t a = self.dim(), b = other.dim();
  check(a > 0 && b > 0, "both arguments to matmul need to be at least 1D, but they are ", a,
        "D and ", b, "D");
  if (a == 1 && b == 1) return ops::dot(self, other);
  if (a == 2 && b == 1) return ops::mv(self, other);
  if (a == 2 && b == 2) return ops::mm(self, other);
  if (a == 1 && b == 2) {
    check(self.sizes()[0] == other.sizes()[0], "mat1 and mat2 shapes cannot be multiplied (1x",
          self.sizes()[0], " and ", other.sizes()[0], "x", other.sizes()[1], ")");
    return ops::mv(ops::t(other), self);
  }
  if (b <= 2) {  // the left operand's batch is just more rows
    const IntSpan lead = self.sizes().first(a - 1);
    const Tensor rows = ops::reshape(self, Dims{product_of(lead), self.sizes()[a - 1]});
    Dims out(lead);
    if (b == 2) out.push_back(other.sizes()[1]);
    return ops::view(b == 2 ? ops::mm(rows, other) : ops::mv(rows, other), out);
  }
  if (a == 1) {
    return ops::squeeze_dim(ops::matmul(ops::unsqueeze(self, 0), other), Dims{-2});
  }
  const Dims batch = broadcast_shapes(self.sizes().first(a - 2), other.sizes().first(b - 2));
  const int64_t count = product_of(batch);
  const auto batched = [&](const Tensor& t) {
    const int64_t n = t.dim();
    Dims full(batch);
    full.push_back(t.sizes()[n - 2]);
    full.push_back(t.sizes()[n - 1]);
    const Tensor wide = ops::expand(t, full, false);
    return ops::reshape(wide, Dims{count, full[full.size() - 2], full[full.size() - 1]});
  };
  Dims out(batch);
  out.push_back(self.sizes()[a - 2]);
  out.push_back(other.sizes()[b - 1]);
  return ops::view(ops::bmm(batched(self), batched(other)), out);
}

Tensor bilinear(const Tensor& input1, const Tensor& input2, const Tensor& weight,
                const Tensor& bias) {
  check(weight.dim() == 3, "bilinear(): weight must be 3-D (out, in1, in2), got ", weight.sizes());
  check(input1.dim() == input2.dim() && input1.dim() > 0,
        "bilinear(): input dimensions do not match: got ", input1.sizes(), " and ", input2.sizes());
  check(input1.size(-1) == weight.sizes()[1] && input2.size(-1) == weight.sizes()[2],
        "bilinear(): inputs of shapes ", input1.sizes(), " and ", input2.sizes(),
        " do not fit weight ", weight.sizes());
  const int64_t o = weight.sizes()[0], i = weight.sizes()[1], j = weight.sizes()[2];
  Dims out_shape(input1.sizes().first(input1.dim() - 1));
  const int64_t n = product_of(out_shape);
  out_shape.push_back(o);
  // (n, i) @ (i, o·j) -> (n, o, j); times x2, summed over j.
  const Tensor w = ops::reshape(ops::permute(weight, Dims{1, 0, 2}), Dims{i, o * j});
  const Tensor left = ops::view(ops::mm(ops::reshape(input1, Dims{n, i}), w), Dims{n, o, j});
  const Tensor right = ops::reshape(input2, Dims{n, j, 1});
  Tensor out = ops::view(ops::bmm(left, right), out_shape);
  return bias.defined() ? ops::add(out, bias, Scalar(1)) : out;
}

Tensor tensordot(const Tensor& self, const Tensor& other, IntSpan dims_self, IntSpan dims_other) {
  check(dims_self.size() == dims_other.size(), "both dimension lists should have same length");
  const int64_t a = self.dim(), b = other.dim();
  Dims left_order, right_order, out, left_dims, right_dims;
  uint64_t left_used = 0, right_used = 0;
  int64_t contracted = 1;
  for (size_t i = 0; i < dims_self.size(); ++i) {
    const int64_t d = wrap_dim(dims_self[i], a), e = wrap_dim(dims_other[i], b);
    // An extent of 1 is summed over the other's whole extent.
    if (self.sizes()[d] != other.sizes()[e] && (self.sizes()[d] == 1 || other.sizes()[e] == 1)) {
      const Tensor a1 =
          other.sizes()[e] == 1 ? ops::sum_dim(self, IntSpan(Dims{d}), true, self.dtype()) : self;
      const Tensor b1 =
          self.sizes()[d] == 1 ? ops::sum_dim(other, IntSpan(Dims{e}), true, other.dtype()) : other;
      return ops::tensordot(a1, b1, dims_self, dims_other);
    }
    check(self.sizes()[d] == other.sizes()[e],
          "contracted dimensions need to match, but first has size ", self.sizes()[d], " in dim ",
          d, " and second has size ", other.sizes()[e], " in dim ", e);
    check(!(left_used >> d & 1) && !(right_used >> e & 1),
          "tensordot: a dimension appears twice in ", dims_self, " or ", dims_other);
    left_used |= uint64_t{1} << d;
    right_used |= uint64_t{1} << e;
    left_dims.push_back(d);
    right_dims.push_back(e);
    contracted *= self.sizes()[d];
  }
  int64_t m = 1, n = 1;
  for (int64_t d = 0; d < a; ++d) {
    if (left_used >> d & 1) continue;
    left_order.push_back(d);
    out.push_back(self.sizes()[d]);
    m *= self.sizes()[d];
  }
  for (const int64_t d : right_dims) right_order.push_back(d);
  for (int64_t d = 0; d < b; ++d) {
    if (right_used >> d & 1) continue;
    right_order.push_back(d);
    out.push_back(other.sizes()[d]);
    n *= other.sizes()[d];
  }
  for (const int64_t d : left_dims) left_order.push_back(d);
  const Tensor left = ops::reshape(ops::permute(self, left_order), Dims{m, contracted});
  const Tensor right = ops::reshape(ops::permute(other, right_order), Dims{contracted, n});
  return ops::view(ops::mm(left, right), out);
}

Tensor chain_matmul(TensorSpan matrices) {
  check(!matrices.empty(), "chain_matmul(): Expected one or more matrices");
  for (const Tensor& t : matrices)
    check(t.dim() == 2, "chain_matmul(): Tensor dimension is ", t.dim(), ", expected 2 instead.");
  Tensor out = matrices[0];
  for (size_t i = 1; i < matrices.size(); ++i) out = ops::mm(out, matrices[i]);
  return out;
}

}  // namespace vt::composite
