// Output shapes of indexing and joining ops.
#include "core/tensor_iterator.h"
#include "vt/meta_decls.h"

namespace vt::meta {

Tensor index_select(const Tensor& self, int64_t dim, const Tensor& index) {
  check_index(index.dim() <= 1,
              "index_select(): Index is supposed to be a vector, but got dim: ", index.dim());
  check(index.dtype() == DType::Int64 || index.dtype() == DType::Int32,
        "index_select(): Expected dtype int32 or int64 for index");
  Dims sizes(self.sizes());
  const int64_t d = wrap_dim(dim, self.dim());
  check(self.dim() > 0 || index.numel() == 1,
        "index_select(): Index to scalar can have only 1 value, got ", index.numel(), " value(s)");
  if (!sizes.empty()) sizes[d] = index.numel();
  return empty(sizes, self.dtype(), self.device());
}

Tensor _wrap_index(const Tensor& self, int64_t, int64_t) {
  check_index(is_integral(self.dtype()),
              "tensors used as indices must be long or int tensors, got ", self.dtype());
  return empty(self.sizes(), DType::Int64, self.device());
}

Tensor gather(const Tensor& self, int64_t dim, const Tensor& index, bool) {
  check(is_integral(index.dtype()), "gather(): Expected an integer dtype for index, got ",
        index.dtype());
  const int64_t d = wrap_dim(dim, self.dim());
  check(index.numel() == 0 || std::max<int64_t>(index.dim(), 1) == std::max<int64_t>(self.dim(), 1),
        "Index tensor must have the same number of dimensions as input tensor (shapes ",
        index.sizes(), " and ", self.sizes(), ")");
  for (int64_t i = 0; i < index.dim() && index.numel() > 0 && self.dim() == index.dim(); ++i) {
    check(i == d || index.sizes()[i] <= self.sizes()[i], "Size does not match at dimension ", i,
          " expected index ", index.sizes(), " to be no larger than self ", self.sizes(),
          " apart from dimension ", d);
  }
  return empty(index.sizes(), self.dtype(), self.device());
}

Tensor cat(TensorSpan tensors, int64_t dim) {
  check_value(!tensors.empty(), "torch.cat(): expected a non-empty list of Tensors");
  SmallVector<const Tensor*, 8> all;
  const Tensor* lead = nullptr;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i].dim() > 0, "zero-dimensional tensor (at position ", i,
          ") cannot be concatenated");
    all.push_back(&tensors[i]);
    // A 1-D empty tensor joins anything (kept from early torch).
    if (!lead && !(tensors[i].dim() == 1 && tensors[i].numel() == 0)) lead = &tensors[i];
  }
  const std::span<const Tensor* const> span(all.data(), all.size());
  const Device device = common_device(span, "cat");
  const DType dtype = result_type(span);
  if (!lead) return empty(Dims{0}, dtype, device);
  const int64_t d = wrap_dim(dim, lead->dim());
  Dims sizes(lead->sizes());
  sizes[d] = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (t.dim() == 1 && t.numel() == 0) continue;
    check(t.dim() == lead->dim(), "Tensors must have same number of dimensions: got ", lead->dim(),
          " and ", t.dim());
    for (int64_t k = 0; k < t.dim(); ++k) {
      check(k == d || t.sizes()[k] == lead->sizes()[k],
            "Sizes of tensors must match except in dimension ", d, ". Expected size ",
            lead->sizes()[k], " but got size ", t.sizes()[k], " for tensor number ", i,
            " in the list.");
    }
    sizes[d] += t.sizes()[d];
  }
  return empty(sizes, dtype, device);
}

}  // namespace vt::meta
