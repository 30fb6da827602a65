// Checks and output shapes of the matrix products.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {
namespace {

void check_same_dtype(const Tensor& a, const Tensor& b, std::string_view a_name,
                      std::string_view b_name, std::string_view op) {
  check(a.dtype() == b.dtype(), "expected ", a_name, " and ", b_name,
        " to have the same dtype, but got: ", a.dtype(), " != ", b.dtype());
  if (a.dtype() == DType::Bool)
    fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for 'Bool'");
}
Device device_of(const Tensor& a, const Tensor& b, std::string_view op) {
  const Tensor* all[] = {&a, &b};
  return common_device(all, op);
}
void check_expandable(const Tensor& self, IntSpan shape, std::string_view op) {
  bool ok = self.dim() <= static_cast<int64_t>(shape.size());
  for (int64_t d = 1; ok && d <= self.dim(); ++d) {
    const int64_t have = self.sizes()[self.dim() - d];
    ok = have == 1 || have == shape[shape.size() - d];
  }
  check(ok, op, ": the tensor to add, of shape ", self.sizes(),
        ", does not broadcast to the product's shape ", shape);
}

Tensor product(const Tensor& a, const Tensor& b, std::string_view op) {
  check(a.sizes()[1] == b.sizes()[0], "mat1 and mat2 shapes cannot be multiplied (", a.sizes()[0],
        "x", a.sizes()[1], " and ", b.sizes()[0], "x", b.sizes()[1], ")");
  check_same_dtype(a, b, "m1", "m2", op);
  return empty(Dims{a.sizes()[0], b.sizes()[1]}, a.dtype(), device_of(a, b, op));
}

}  // namespace

Tensor mm(const Tensor& self, const Tensor& mat2) {
  check(self.dim() == 2, "self must be a matrix");
  check(mat2.dim() == 2, "mat2 must be a matrix");
  return product(self, mat2, "mm");
}

Tensor _int_mm(const Tensor& self, const Tensor& mat2) {
  check(self.dim() == 2, "_int_mm: Expected self to be of dimension 2 but got ", self.dim());
  check(mat2.dim() == 2, "_int_mm: Expected mat2 to be of dimension 2 but got ", mat2.dim());
  check(self.dtype() == DType::Int8 && mat2.dtype() == DType::Int8,
        "_int_mm: Expected self and mat2 to be int8 but got ", self.dtype(), " and ", mat2.dtype());
  check(self.sizes()[1] == mat2.sizes()[0], "_int_mm: mat1 and mat2 shapes cannot be multiplied (",
        self.sizes()[0], "x", self.sizes()[1], " and ", mat2.sizes()[0], "x", mat2.sizes()[1], ")");
  return empty(Dims{self.sizes()[0], mat2.sizes()[1]}, DType::Int32,
               device_of(self, mat2, "_int_mm"));
}

Tensor _scaled_mm(const Tensor& self, const Tensor& mat2, const Tensor& scale_a,
                  const Tensor& scale_b, const Tensor& bias, const Tensor& scale_result,
                  std::optional<DType> out_dtype, bool) {
  check(self.dim() == 2, "_scaled_mm: mat1 must be a matrix, got ", self.dim(), "-D tensor");
  check(mat2.dim() == 2, "_scaled_mm: mat2 must be a matrix, got ", mat2.dim(), "-D tensor");
  const int64_t m = self.sizes()[0], k = self.sizes()[1], n = mat2.sizes()[1];
  check(k == mat2.sizes()[0], "_scaled_mm: mat_a and mat_b shapes cannot be multiplied (", m, "x",
        k, " and ", mat2.sizes()[0], "x", n, ")");
  const auto single = [](const Tensor& t) { return t.numel() == 1; };
  const auto is_shape = [](const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == columns && t.is_contiguous();
  };
  const bool scaled = scale_a.dtype() == DType::Float32 && scale_b.dtype() == DType::Float32 &&
                      ((single(scale_a) && single(scale_b)) ||
                       (is_shape(scale_a, m, 1) && is_shape(scale_b, 1, n)));
  check_value(is_float8(self.dtype()) && is_float8(mat2.dtype()) && scaled,
              "_scaled_mm: Invalid scaling configuration. self and mat2 are float8_e4m3fn or "
              "float8_e5m2, and the scales float32 and contiguous: one number each, or of shapes [",
              m, ", 1] and [1, ", n, "]. Got self ", self.dtype(), " ", self.sizes(), ", mat2 ",
              mat2.dtype(), " ", mat2.sizes(), ", scale_a ", scale_a.dtype(), " ", scale_a.sizes(),
              ", scale_b ", scale_b.dtype(), " ", scale_b.sizes());
  check(!bias.defined() || bias.numel() == n, "_scaled_mm: Bias must be size ", n, " but got ",
        bias.defined() ? bias.numel() : 0);
  check(!bias.defined() || (is_floating(bias.dtype()) && !is_float8(bias.dtype())),
        "_scaled_mm: bias must be of 16-bit floats or wider, got ",
        bias.defined() ? bias.dtype() : DType::Float32);
  check(!scale_result.defined() ||
            (scale_result.dtype() == DType::Float32 && scale_result.numel() == 1),
        "_scaled_mm: scale_result must be one float32 number, got ",
        scale_result.defined() ? scale_result.sizes() : IntSpan());
  const DType type = out_dtype.value_or(self.dtype());
  check_value(is_floating(type) && type != DType::Float64,
              "_scaled_mm: out_dtype must be float32, bfloat16, float16, float8_e4m3fn or "
              "float8_e5m2, got ",
              type);
  return empty(Dims{m, n}, type, device_of(self, mat2, "_scaled_mm"));
}

Tensor addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, const Scalar&,
             const Scalar&) {
  check(mat1.dim() == 2, "mat1 must be a matrix, got ", mat1.dim(), "-D tensor");
  check(mat2.dim() == 2, "mat2 must be a matrix, got ", mat2.dim(), "-D tensor");
  Tensor out = product(mat1, mat2, "addmm");
  check(self.dtype() == mat1.dtype(), "self and mat2 must have the same dtype, but got ",
        self.dtype(), " and ", mat1.dtype());
  check_expandable(self, out.sizes(), "addmm");
  return out;
}

Tensor bmm(const Tensor& self, const Tensor& mat2) {
  check(self.dim() == 3, "batch1 must be a 3D tensor");
  check(mat2.dim() == 3, "batch2 must be a 3D tensor");
  const auto a = self.sizes(), b = mat2.sizes();
  check(a[0] == b[0] && a[2] == b[1],
        "Expected size for first two dimensions of batch2 tensor to be: [", a[0], ", ", a[2],
        "] but got: [", b[0], ", ", b[1], "].");
  check_same_dtype(self, mat2, "batch1", "batch2", "bmm");
  return empty(Dims{a[0], a[1], b[2]}, self.dtype(), device_of(self, mat2, "bmm"));
}

Tensor baddbmm(const Tensor& self, const Tensor& batch1, const Tensor& batch2, const Scalar&,
               const Scalar&) {
  Tensor out = bmm(batch1, batch2);
  check(self.dtype() == batch1.dtype(), "Input dtypes must be the same, got: input ", self.dtype(),
        ", batch1: ", batch1.dtype(), ", batch2: ", batch2.dtype());
  check_expandable(self, out.sizes(), "baddbmm");
  return out;
}

Tensor mv(const Tensor& self, const Tensor& vec) {
  check(self.dim() == 2 && vec.dim() == 1, "vector + matrix @ vector expected, got 1, ", self.dim(),
        ", ", vec.dim());
  check(self.sizes()[1] == vec.sizes()[0], "size mismatch, got input (", self.sizes()[0],
        "), mat (", self.sizes()[0], "x", self.sizes()[1], "), vec (", vec.sizes()[0], ")");
  check_same_dtype(self, vec, "mat", "vec", "mv");
  return empty(Dims{self.sizes()[0]}, self.dtype(), device_of(self, vec, "mv"));
}

Tensor addmv(const Tensor& self, const Tensor& mat, const Tensor& vec, const Scalar&,
             const Scalar&) {
  Tensor out = mv(mat, vec);
  check(self.dtype() == mat.dtype(), "self and mat must have the same dtype, but got ",
        self.dtype(), " and ", mat.dtype());
  check_expandable(self, out.sizes(), "addmv");
  return out;
}

Tensor dot(const Tensor& self, const Tensor& tensor) {
  check(self.dim() == 1 && tensor.dim() == 1, "1D tensors expected, but got ", self.dim(), "D and ",
        tensor.dim(), "D tensors");
  check(self.dtype() == tensor.dtype(),
        "dot : expected both vectors to have same dtype, but found ", self.dtype(), " and ",
        tensor.dtype());
  check(self.numel() == tensor.numel(), "inconsistent tensor size, expected tensor [", self.numel(),
        "] and src [", tensor.numel(), "] to have the same number of elements, but got ",
        self.numel(), " and ", tensor.numel(), " elements respectively");
  check_same_dtype(self, tensor, "self", "tensor", "dot");
  return empty(Dims{}, self.dtype(), device_of(self, tensor, "dot"));
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  check(weight.dim() == 2, "linear: weight must be 2-D (out_features, in_features), got shape ",
        weight.sizes());
  check(input.dim() >= 1,
        "linear(): argument 'input' (position 1) must be at least 1-D, got shape ", input.sizes());
  const int64_t k = input.sizes()[input.dim() - 1];
  check(k == weight.sizes()[1], "mat1 and mat2 shapes cannot be multiplied (",
        k == 0 ? 0 : input.numel() / k, "x", k, " and ", weight.sizes()[1], "x", weight.sizes()[0],
        ")");
  check(input.dtype() == weight.dtype(), "mat1 and mat2 must have the same dtype, but got ",
        input.dtype(), " and ", weight.dtype());
  if (bias.defined()) {
    check(bias.dim() <= 1 && (bias.numel() == weight.sizes()[0]), "linear: bias of shape ",
          bias.sizes(), " does not fit ", weight.sizes()[0], " output features");
    check(bias.dtype() == weight.dtype(), "self and mat2 must have the same dtype, but got ",
          bias.dtype(), " and ", weight.dtype());
  }
  check_same_dtype(input, weight, "mat1", "mat2", "linear");
  Dims sizes(input.sizes());
  sizes[sizes.size() - 1] = weight.sizes()[0];
  return empty(sizes, input.dtype(), device_of(input, weight, "linear"));
}

}  // namespace vt::meta
