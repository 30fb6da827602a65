// Advanced indexing: masks become positions, several index tensors become one flat index, and the
// work is an index_select, index_copy_ or index_add_ over one dimension.
#include "autograd/front.h"
#include "core/tensor_iterator.h"
#include "dispatch/thread_state.h"
#include "ops/composite/placement.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

/// The indexed tensor with its indexed dimensions merged in front, and the flat positions there.
struct Flattened {
  Dims order;        // permutation that brings the indexed dimensions to the front
  Dims rest;         // extents of the others
  Dims index_shape;  // broadcast shape of the index tensors
  int64_t positions = 1;
  int64_t insert_at = 0;  // where index_shape goes in the result
  Tensor linear;          // int64, flat
};

std::vector<Tensor> expand_masks(const Tensor& self, TensorSpan indices) {
  std::vector<Tensor> out;
  for (const Tensor& given : indices) {
    // An index in host memory follows the tensor it indexes; one on a device is not fetched.
    Tensor index = given;
    if (given.defined() && given.device() != self.device()) {
      check(given.device().is_cpu(),
            "indices should be either on cpu or on the same device as the "
            "indexed tensor (",
            self.device(), "), got an index on ", given.device());
      index = moved_to(given, self.device());
    }
    if (!index.defined() || (index.dtype() != DType::Bool && index.dtype() != DType::UInt8)) {
      if (index.defined()) {
        check_index(is_integral(index.dtype()),
                    "tensors used as indices must be long, int, byte or bool tensors");
      }
      out.push_back(index.defined() && index.dtype() != DType::Int64
                        ? ops::_to_dtype(index, DType::Int64)
                        : index);
      continue;
    }
    for (int64_t d = 0; d < index.dim(); ++d) {
      const int64_t dim = static_cast<int64_t>(out.size()) + d;
      check_index(dim < self.dim() && index.sizes()[d] == self.sizes()[dim],
                  "The shape of the mask ", index.sizes(), " at index ", d,
                  " does not match the shape of the indexed tensor ", self.sizes(), " at index ",
                  dim);
    }
    const Tensor positions = ops::nonzero(index);
    for (int64_t d = 0; d < index.dim(); ++d) out.push_back(ops::select(positions, 1, d));
  }
  check_index(static_cast<int64_t>(out.size()) <= self.dim(),
              "too many indices for tensor of dimension ", self.dim(), " (got ", out.size(), ")");
  out.resize(static_cast<size_t>(self.dim()));
  return out;
}

Flattened flatten_indices(const Tensor& self, TensorSpan given) {
  const std::vector<Tensor> indices = expand_masks(self, given);
  Flattened f;
  SmallVector<const Tensor*, 8> used;
  for (const Tensor& index : indices) {
    if (index.defined()) used.push_back(&index);
  }
  for (const Tensor& t : given) {
    check_index(!t.defined() || t.dim() > 0 || t.dtype() != DType::Bool,
                "a mask of no dimensions is no index of a dimension; write self[mask]");
  }
  check_index(!used.empty(), "an index needs at least one tensor");
  try {
    f.index_shape =
        broadcast_shapes(std::span<const Tensor* const>(used.data(), used.size()), "index");
  } catch (const Error&) {
    std::string shapes;
    for (const Tensor* t : used) shapes += (shapes.empty() ? "" : ", ") + str(t->sizes());
    fail(ErrorKind::Index,
         "shape mismatch: indexing tensors could not be broadcast together with shapes ", shapes);
  }
  int64_t first = -1, last = -1;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (!indices[d].defined()) continue;
    if (first < 0) first = d;
    last = d;
    f.order.push_back(d);
    f.positions *= self.sizes()[d];
  }
  bool adjacent = true;
  for (int64_t d = first; d <= last; ++d) adjacent &= indices[d].defined();
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (indices[d].defined()) continue;
    f.order.push_back(d);
    f.rest.push_back(self.sizes()[d]);
  }
  f.insert_at = adjacent ? first : 0;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (!indices[d].defined()) continue;
    const int64_t size = self.sizes()[d];
    const Tensor index = ops::_wrap_index(indices[d], d, size);
    f.linear = f.linear.defined()
                   ? ops::add(ops::mul(f.linear, wrapped_scalar(Scalar(size))), index, Scalar(1))
                   : index;
  }
  f.linear = ops::reshape(ops::expand(f.linear, f.index_shape, false), Dims{-1});
  return f;
}

Dims with_front(int64_t front, IntSpan rest) {
  Dims shape{front};
  shape.append(rest.begin(), rest.end());
  return shape;
}

/// A value to write into elements of `dtype`, which must have it if it is a Python number.
Tensor as_element(const Tensor& value, DType dtype) {
  if (value.impl()->wrapped_number) check_fits(value.item(), dtype);
  return value.dtype() == dtype ? value : ops::_to_dtype(value, dtype);
}

bool in_order(IntSpan order) {
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] != static_cast<int64_t>(i)) return false;
  }
  return true;
}

}  // namespace

/// The result is row-major.
Tensor index(const Tensor& self, TensorSpan indices) {
  const Flattened f = flatten_indices(self, indices);
  // Where the index tensors stand side by side, their dimensions are one in the middle; otherwise
  // they move to the front, where the result has them.
  Dims merged, shape;
  for (int64_t d = 0; d < f.insert_at; ++d) merged.push_back(f.rest[d]);
  shape = merged;
  merged.push_back(f.positions);
  shape.append(f.index_shape.begin(), f.index_shape.end());
  for (size_t d = static_cast<size_t>(f.insert_at); d < f.rest.size(); ++d) {
    merged.push_back(f.rest[d]);
    shape.push_back(f.rest[d]);
  }
  const Tensor source = f.insert_at > 0 || in_order(f.order) ? self : ops::permute(self, f.order);
  return ops::reshape(ops::index_select(ops::reshape(source, merged), f.insert_at, f.linear),
                      shape);
}

Tensor index_put_(const Tensor& self, TensorSpan indices, const Tensor& values, bool accumulate) {
  check(values.dtype() == self.dtype(),
        "Index put requires the source and destination dtypes match, got ", self.dtype(),
        " for the destination and ", values.dtype(), " for the source.");
  const Flattened f = flatten_indices(self, indices);
  // Values broadcast against the result of index(): bring them to [index…, rest…].
  Dims result;
  for (int64_t d = 0; d < f.insert_at; ++d) result.push_back(f.rest[d]);
  result.append(f.index_shape.begin(), f.index_shape.end());
  for (size_t d = static_cast<size_t>(f.insert_at); d < f.rest.size(); ++d)
    result.push_back(f.rest[d]);
  Tensor source = number_on(values, self.device());
  Dims trimmed(values.sizes());
  while (trimmed.size() > result.size() && trimmed[0] == 1) trimmed.erase(0);
  if (trimmed.size() != values.sizes().size()) source = ops::reshape(source, trimmed);
  bool fits = source.sizes().size() <= result.size();
  for (size_t i = 0; fits && i < source.sizes().size(); ++i) {
    const int64_t have = source.sizes()[source.sizes().size() - 1 - i];
    fits = have == 1 || have == result[result.size() - 1 - i];
  }
  check(fits, "shape mismatch: value tensor of shape ", values.sizes(),
        " cannot be broadcast to indexing result of shape ", IntSpan(result));
  source = ops::expand(source, result, false);
  if (f.insert_at > 0) {
    Dims from, to;
    for (int64_t d = 0; d < static_cast<int64_t>(f.index_shape.size()); ++d) {
      from.push_back(f.insert_at + d);
      to.push_back(d);
    }
    source = ops::movedim(source, from, to);
  }
  source = ops::reshape(source, with_front(f.linear.numel(), f.rest));
  const Tensor front = in_order(f.order) ? self : ops::permute(self, f.order);
  auto write = [&](const Tensor& target) {
    if (accumulate)
      ops::index_add_(target, 0, f.linear, source, Scalar(1));
    else
      ops::index_copy_(target, 0, f.linear, source);
  };
  const Dims flat = with_front(f.positions, f.rest);
  if (front.is_contiguous()) {
    write(ops::view(front, flat));
    return self;
  }
  const Tensor work = ops::reshape(ops::clone(front, MemoryFormat::Contiguous), flat);
  write(work);
  ops::copy_(front, ops::reshape(work, front.sizes()), false);
  return self;
}
Tensor index_put(const Tensor& self, TensorSpan indices, const Tensor& values, bool accumulate) {
  return ops::index_put_(ops::clone(self, std::nullopt), indices, values, accumulate);
}

Tensor index_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source,
                 const Scalar& alpha) {
  return ops::index_add_(ops::clone(self, std::nullopt), dim, index, source, alpha);
}
Tensor index_copy(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& source) {
  return ops::index_copy_(ops::clone(self, std::nullopt), dim, index, source);
}
Tensor index_fill_(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& value) {
  Dims sizes(self.sizes());
  if (!sizes.empty()) sizes[wrap_dim(dim, self.dim())] = index.numel();
  check(value.dim() == 0,
        "index_fill_ only supports a 0-dimensional value tensor, but got tensor with ", value.dim(),
        " dimension(s).");
  const Tensor typed = as_element(value, self.dtype());
  if (thread_state.grad_enabled && autograd::any_requires_grad(value) && self.dim() > 0) {
    // A position that index names twice counts once in the gradient of the value.
    const int64_t d = wrap_dim(dim, self.dim());
    Dims along(static_cast<size_t>(self.dim()), 1);
    along[d] = self.sizes()[d];
    const Tensor named =
        ops::index_copy(ops::zeros(Dims{along[d]}, DType::Bool, self.device()), 0, index,
                        ops::ones(Dims{index.numel()}, DType::Bool, self.device()));
    return ops::masked_fill_(self, ops::reshape(named, along), typed);
  }
  return ops::index_copy_(self, dim, index,
                          ops::expand(number_on(typed, self.device()), sizes, false));
}
Tensor index_fill(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& value) {
  return ops::index_fill_(ops::clone(self, std::nullopt), dim, index, value);
}

Tensor scatter_add(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  return ops::scatter_add_(ops::clone(self, std::nullopt), dim, index, src);
}
Tensor scatter_(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  if (src.impl()->wrapped_number || (src.dim() == 0 && index.dim() != 0))
    return ops::scatter__value(self, dim, index, src);
  return ops::_scatter_(self, dim, index, src);
}
Tensor scatter(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& src) {
  return ops::scatter_(ops::clone(self, std::nullopt), dim, index, src);
}
Tensor scatter__value(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& value) {
  const Tensor typed = as_element(value, self.dtype());
  return ops::_scatter_(self, dim, index,
                        ops::expand(number_on(typed, self.device()), index.sizes(), false));
}
Tensor scatter_value(const Tensor& self, int64_t dim, const Tensor& index, const Tensor& value) {
  return ops::scatter__value(ops::clone(self, std::nullopt), dim, index, value);
}

Tensor take_along_dim(const Tensor& self, const Tensor& indices, std::optional<int64_t> dim) {
  if (!dim)
    return ops::gather(ops::reshape(self, Dims{-1}), 0, ops::reshape(indices, Dims{-1}), false);
  check(self.dim() == indices.dim(),
        "torch.take_along_dim(): input and indices should have the same number of dimensions, but "
        "got ",
        self.dim(), " dimensions for input, and ", indices.dim(), " dimensions for indices");
  const int64_t d = wrap_dim(*dim, self.dim());
  Dims a(self.sizes()), b(indices.sizes());
  a[d] = b[d] = 1;
  Dims shape = broadcast_shapes(a, b);
  Dims self_shape(shape), index_shape(shape);
  self_shape[d] = self.sizes()[d];
  index_shape[d] = indices.sizes()[d];
  check(is_integral(indices.dtype()),
        "torch.take_along_dim(): dtype of indices should be Long but got ", indices.dtype());
  // Negative positions count from the end.
  const Tensor positions =
      ops::where(ops::lt(indices, wrapped_scalar(Scalar(0))),
                 ops::add(indices, wrapped_scalar(Scalar(self.size(d))), Scalar(1)), indices);
  return ops::gather(ops::expand(self, self_shape, false), d,
                     ops::contiguous(ops::expand(positions, index_shape, false), std::nullopt),
                     false);
}
Tensor take(const Tensor& self, const Tensor& index) {
  check(index.dtype() == DType::Int64, "take(): Expected a long tensor for index, but got ",
        index.dtype());
  check_index(self.numel() > 0 || index.numel() == 0, "take(): tried to take from an empty tensor");
  const Tensor flat = ops::_wrap_index(ops::reshape(index, Dims{-1}), 0, self.numel());
  return ops::reshape(ops::index_select(ops::reshape(self, Dims{-1}), 0, flat), index.sizes());
}

Tensor nonzero(const Tensor& self) {
  // The number of results depends on the values: the one number the host has to know.
  const NoGrad no_grad;
  const Tensor flags = ops::contiguous(
      self.dtype() == DType::Bool ? self : ops::ne(self, wrapped_scalar(Scalar(int64_t{0}))),
      std::nullopt);
  const int64_t count = ops::count_nonzero(flags, std::nullopt).item().to_int();
  return ops::_nonzero_(vt::empty(Dims{count, self.dim()}, DType::Int64, self.device()), flags);
}
Tensor argwhere(const Tensor& self) { return ops::nonzero(self); }

Tensor masked_select(const Tensor& self, const Tensor& mask) {
  check(mask.dtype() == DType::Bool, "masked_select: expected BoolTensor for mask");
  const Dims shape = broadcast_shapes(self.sizes(), mask.sizes());
  const Tensor values = ops::reshape(ops::expand(self, shape, false), Dims{-1});
  const Tensor where =
      ops::reshape(ops::nonzero(ops::reshape(ops::expand(mask, shape, false), Dims{-1})), Dims{-1});
  return ops::index_select(values, 0, where);
}
Tensor masked_scatter_(const Tensor& self, const Tensor& mask, const Tensor& source) {
  check(mask.dtype() == DType::Bool,
        "masked_scatter_ only supports boolean masks, but got mask with dtype ", mask.dtype());
  const Tensor full = ops::expand(mask, self.sizes(), false);
  const Tensor where = ops::reshape(ops::nonzero(ops::reshape(full, Dims{-1})), Dims{-1});
  check(source.numel() >= where.numel(),
        "masked_scatter: expected self and source to have same dtypes and enough source elements (",
        where.numel(), " needed, ", source.numel(), " given)");
  const Tensor values = ops::slice(ops::reshape(source, Dims{-1}), 0, 0, where.numel(), 1);
  const Tensor flat = ops::reshape(ops::clone(self, MemoryFormat::Contiguous), Dims{-1});
  ops::index_copy_(flat, 0, where, values);
  return ops::copy_(self, ops::reshape(flat, self.sizes()), false);
}

Tensor one_hot(const Tensor& self, int64_t num_classes) {
  check(self.dtype() == DType::Int64,
        "one_hot is only applicable to index tensor of type LongTensor.");
  if (self.numel() == 0)
    check(num_classes > 0, "Can not infer total number of classes from empty tensor.");
  int64_t classes = num_classes;
  // With the number of classes given neither a device is waited for nor a recording refused: a
  // class outside it is no column.
  const bool looked_at = self.device().is_cpu() && !thread_state.consumer;
  if (self.numel() > 0 && (num_classes == -1 || looked_at)) {
    check(ops::min(self).item().to_int() >= 0, "Class values must be non-negative.");
    const int64_t top = ops::max(self).item().to_int();
    if (classes == -1) classes = top + 1;
    check(top < classes, "Class values must be smaller than num_classes.");
  }
  const Tensor range = ops::arange_start(Scalar(int64_t{0}), Scalar(classes), Scalar(1),
                                         DType::Int64, self.device());
  return ops::_to_dtype(ops::eq(ops::unsqueeze(self, -1), range), DType::Int64);
}

}  // namespace vt::composite
