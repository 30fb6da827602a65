// Cutting into pieces by count or position, columns, and quarter turns.
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {

Tensor column_stack(TensorSpan tensors) {
  check(!tensors.empty(), "column_stack expects a non-empty TensorList");
  std::vector<Tensor> columns;
  for (const Tensor& t : tensors)
    columns.push_back(t.dim() <= 1 ? ops::reshape(t, Dims{t.numel(), 1}) : t);
  return ops::hstack(columns);
}

std::vector<Tensor> tensor_split(const Tensor& self, int64_t sections, int64_t dim) {
  check(self.dim() > 0,
        "tensor_split expected at least a 1-dimensional tensor, but got a tensor with 0 dims");
  check(sections > 0, "number of sections must be larger than 0, got ", sections);
  const int64_t d = wrap_dim(dim, self.dim()), size = self.size(d);
  std::vector<Tensor> out;
  int64_t start = 0;
  for (int64_t i = 0; i < sections; ++i) {
    const int64_t end = start + size / sections + (i < size % sections);
    out.push_back(ops::slice(self, d, start, end, 1));
    start = end;
  }
  return out;
}
std::vector<Tensor> tensor_split_indices(const Tensor& self, IntSpan indices, int64_t dim) {
  check(self.dim() > 0,
        "tensor_split expected at least a 1-dimensional tensor, but got a tensor with 0 dims");
  const int64_t d = wrap_dim(dim, self.dim());
  std::vector<Tensor> out;
  int64_t start = 0;
  for (const int64_t end : indices) {
    out.push_back(ops::slice(self, d, start, end, 1));
    start = end;
  }
  out.push_back(ops::slice(self, d, start, self.size(d), 1));
  return out;
}

std::vector<Tensor> tensor_split_tensor(const Tensor& self, const Tensor& at, int64_t dim) {
  // Shapes follow from the numbers, so they must be where they can be read without waiting.
  check(at.device().is_cpu(),
        "tensor_split expected tensor_indices_or_sections to be on cpu, but it's on ", at.device());
  check(at.dtype() == DType::Int64 && at.dim() <= 1,
        "tensor_split expected tensor_indices_or_sections to be a zero-dimensional or "
        "one-dimensional int64 tensor, but got ",
        at);
  if (at.dim() == 0) return ops::tensor_split(self, at.item().to_int(), dim);
  const Tensor dense = ops::contiguous(at, std::nullopt);
  const IntSpan indices(dense.data_as<int64_t>(), static_cast<size_t>(dense.numel()));
  return ops::tensor_split_indices(self, indices, dim);
}

std::vector<Tensor> hsplit(const Tensor& self, int64_t sections) {
  check(self.dim() >= 1,
        "torch.hsplit requires a tensor with at least 1 dimension, but got a tensor with 0 "
        "dimensions!");
  const int64_t d = self.dim() == 1 ? 0 : 1;
  check(sections > 0 && self.size(d) % sections == 0,
        "torch.hsplit attempted to split along dimension ", d, ", but the size of the dimension ",
        self.size(d), " is not divisible by the split_size ", sections, "!");
  return ops::tensor_split(self, sections, d);
}
std::vector<Tensor> hsplit_indices(const Tensor& self, IntSpan indices) {
  check(self.dim() >= 1,
        "torch.hsplit requires a tensor with at least 1 dimension, but got a tensor with 0 "
        "dimensions!");
  return ops::tensor_split_indices(self, indices, self.dim() == 1 ? 0 : 1);
}
std::vector<Tensor> vsplit(const Tensor& self, int64_t sections) {
  check(self.dim() >= 2,
        "torch.vsplit requires a tensor with at least 2 dimension, but got a tensor with ",
        self.dim(), " dimensions!");
  check(sections > 0 && self.size(0) % sections == 0,
        "torch.vsplit attempted to split along dimension 0, but the size of the dimension ",
        self.size(0), " is not divisible by the split_size ", sections, "!");
  return ops::tensor_split(self, sections, 0);
}
std::vector<Tensor> vsplit_indices(const Tensor& self, IntSpan indices) {
  check(self.dim() >= 2,
        "torch.vsplit requires a tensor with at least 2 dimension, but got a tensor with ",
        self.dim(), " dimensions!");
  return ops::tensor_split_indices(self, indices, 0);
}

Tensor rot90(const Tensor& self, int64_t k, IntSpan dims) {
  check(dims.size() == 2, "expected total rotation dims == 2, but got dims = ", dims.size());
  check(self.dim() >= 2, "expected total dims >= 2, but got total dims = ", self.dim());
  const int64_t a = wrap_dim(dims[0], self.dim()), b = wrap_dim(dims[1], self.dim());
  check(a != b, "expected rotation dims to be different, but got dim0 = ", dims[0],
        " and dim1 = ", dims[1]);
  switch (((k % 4) + 4) % 4) {
    case 1:
      return ops::transpose(ops::flip(self, Dims{b}), a, b);
    case 2:
      return ops::flip(self, Dims{a, b});
    case 3:
      return ops::flip(ops::transpose(self, a, b), Dims{b});
    default:
      return ops::clone(self, std::nullopt);
  }
}

}  // namespace vt::composite
