// View-like ops made of views, their gradients, and functional writes into views.
#include "autograd/front.h"
#include "autograd/view_nodes.h"
#include "core/tensor_iterator.h"
#include "core/view_geometry.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {

Tensor narrow(const Tensor& self, int64_t dim, int64_t start, int64_t length) {
  check(self.dim() > 0, "narrow() cannot be applied to a 0-dim tensor.");
  check(length >= 0, "narrow(): length must be non-negative.");
  const int64_t size = self.size(dim);
  check_index(start >= -size && start <= size, "start out of range (expected to be in range of [",
              -size, ", ", size, "], but got ", start, ")");
  if (start < 0) start += size;
  check(start <= size - length, "start (", start, ") + length (", length,
        ") exceeds dimension size (", size, ").");
  return ops::slice(self, dim, start, start + length, 1);
}

Tensor narrow_tensor(const Tensor& self, int64_t dim, const Tensor& start, int64_t length) {
  check(start.dim() == 0 && is_integral(start.dtype()),
        "start must be an 0-dim integral Tensor, got ", start);
  return ops::narrow(self, dim, start.item().to_int(), length);
}

std::vector<Tensor> unbind(const Tensor& self, int64_t dim) {
  const int64_t d = wrap_dim(dim, self.dim());
  check_index(self.dim() > 0, "Dimension specified as ", dim, " but tensor has no dimensions");
  std::vector<Tensor> out;
  for (int64_t i = 0; i < self.sizes()[d]; ++i) out.push_back(ops::select(self, d, i));
  autograd::join_pieces(out, self, d, true);
  return out;
}

std::vector<Tensor> split_with_sizes(const Tensor& self, IntSpan split_sizes, int64_t dim) {
  check(self.dim() > 0, "split expects at least a 1-dimensional tensor");
  const int64_t size = self.size(dim);
  std::vector<Tensor> out;
  int64_t start = 0;
  for (const int64_t length : split_sizes) {
    check(
        length >= 0,
        "split_with_sizes expects split_sizes have only non-negative entries, but got split_sizes=",
        split_sizes);
    start += length;
  }
  check(start == size, "split_with_sizes expects split_sizes to sum exactly to ", size,
        " (input tensor's size at dimension ", dim, "), but got split_sizes=", split_sizes);
  start = 0;
  for (const int64_t length : split_sizes) {
    out.push_back(ops::slice(self, dim, start, start + length, 1));
    start += length;
  }
  autograd::join_pieces(out, self, dim, false);
  return out;
}
std::vector<Tensor> split_sizes(const Tensor& self, IntSpan split_size, int64_t dim) {
  return split_with_sizes(self, split_size, dim);
}

std::vector<Tensor> split(const Tensor& self, int64_t split_size, int64_t dim) {
  check(self.dim() > 0, "split expects at least a 1-dimensional tensor");
  check(split_size >= 0,
        "split expects split_size be non-negative, but got split_size=", split_size);
  const int64_t size = self.size(dim);
  check(split_size > 0 || size == 0,
        "split_size can only be 0 if dimension size is 0, but got dimension size of ", size);
  std::vector<Tensor> out;
  int64_t start = 0;
  do {
    const int64_t end = std::min(start + split_size, size);
    out.push_back(ops::slice(self, dim, start, end, 1));
    start = end;
  } while (start < size);
  autograd::join_pieces(out, self, dim, false);
  return out;
}

std::vector<Tensor> chunk(const Tensor& self, int64_t chunks, int64_t dim) {
  check(self.dim() > 0, "chunk expects at least a 1-dimensional tensor");
  check(chunks > 0, "chunk expects `chunks` to be greater than 0, got: ", chunks);
  const int64_t size = self.size(dim);
  const int64_t piece = (size + chunks - 1) / chunks;
  if (piece == 0) {
    const Dims zeros(static_cast<size_t>(chunks), int64_t{0});
    return split_with_sizes(self, zeros, dim);
  }
  return split(self, piece, dim);
}

Tensor movedim(const Tensor& self, IntSpan source, IntSpan destination) {
  check(source.size() == destination.size(),
        "movedim: Invalid source or destination dims: source (", source,
        " dims) should contain the same number of dims as destination (", destination, " dims)");
  const int64_t n = self.dim();
  Dims order(static_cast<size_t>(std::max<int64_t>(n, 1)), int64_t{-1});
  uint64_t moved = 0;
  for (size_t i = 0; i < source.size(); ++i) {
    const int64_t from = wrap_dim(source[i], n), to = wrap_dim(destination[i], n);
    check((moved >> from & 1) == 0, "movedim: repeated dim in `source` (", source, ")");
    check(order[to] < 0, "movedim: repeated dim in `destination` (", destination, ")");
    moved |= uint64_t{1} << from;
    order[to] = from;
  }
  int64_t next = 0;
  for (int64_t& d : order) {
    if (d >= 0) continue;
    while (moved >> next & 1) ++next;
    d = next++;
  }
  if (n == 0) order.clear();  // its one dimension is made up
  return ops::permute(self, order);
}

Tensor flatten(const Tensor& self, int64_t start_dim, int64_t end_dim) {
  const int64_t start = wrap_dim(start_dim, self.dim()), end = wrap_dim(end_dim, self.dim());
  check(start <= end, "flatten() has invalid args: start_dim cannot come after end_dim");
  if (self.dim() == 0) return ops::reshape(self, Dims{1});
  if (start == end) return self;
  Dims shape;
  int64_t merged = 1;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (d < start || d > end) {
      shape.push_back(self.sizes()[d]);
      continue;
    }
    merged *= self.sizes()[d];
    if (d == end) shape.push_back(merged);
  }
  return ops::reshape(self, shape);
}

Tensor unflatten(const Tensor& self, int64_t dim, IntSpan sizes) {
  check(!sizes.empty(), "unflatten: sizes must be non-empty");
  const int64_t d = checked_dim(dim, self.dim());
  const Dims inner = infer_shape(sizes, self.sizes()[d]);
  Dims shape(self.sizes().first(d));
  shape.append(inner.begin(), inner.end());
  shape.append(self.sizes().begin() + d + 1, self.sizes().end());
  return ops::view(self, shape);
}

Tensor reshape(const Tensor& self, IntSpan shape) {
  const Dims target = infer_shape(shape, self.numel());
  if (view_strides(self.sizes(), self.strides(), target)) return ops::view(self, target);
  return ops::view(ops::clone(self, MemoryFormat::Contiguous), target);
}
Tensor reshape_as(const Tensor& self, const Tensor& other) {
  return ops::reshape(self, other.sizes());
}
Tensor view_as(const Tensor& self, const Tensor& other) { return ops::view(self, other.sizes()); }
Tensor expand_as(const Tensor& self, const Tensor& other) {
  return ops::expand(self, other.sizes(), false);
}
Tensor ravel(const Tensor& self) {
  return ops::view(ops::contiguous(self, std::nullopt), Dims{-1});
}
Tensor adjoint(const Tensor& self) {
  return self.dim() == 0 ? vt::alias(self) : ops::transpose(self, -2, -1);
}

namespace {

/// `grad` in the part of a zero tensor that `part` picks. Without a graph to build it is written
/// there directly; `scatter` is the functional form.
template <class Part, class Scatter>
Tensor spread(const Tensor& grad, IntSpan sizes, const Part& part, const Scatter& scatter) {
  const Tensor zeros = ops::zeros(sizes, grad.dtype(), grad.device());
  if (autograd::should_record(grad)) return scatter(zeros);
  ops::copy_(part(zeros), grad, false);
  return zeros;
}

}  // namespace

Tensor select_backward(const Tensor& grad, IntSpan input_sizes, int64_t dim, int64_t index) {
  return spread(
      grad, input_sizes, [&](const Tensor& zeros) { return ops::select(zeros, dim, index); },
      [&](const Tensor& zeros) { return ops::select_scatter(zeros, grad, dim, index); });
}
Tensor slice_backward(const Tensor& grad, IntSpan input_sizes, int64_t dim,
                      std::optional<int64_t> start, std::optional<int64_t> end, int64_t step) {
  return spread(
      grad, input_sizes,
      [&](const Tensor& zeros) { return ops::slice(zeros, dim, start, end, step); },
      [&](const Tensor& zeros) { return ops::slice_scatter(zeros, grad, dim, start, end, step); });
}
Tensor diagonal_backward(const Tensor& grad, IntSpan input_sizes, int64_t offset, int64_t dim1,
                         int64_t dim2) {
  return spread(
      grad, input_sizes,
      [&](const Tensor& zeros) { return ops::diagonal(zeros, offset, dim1, dim2); },
      [&](const Tensor& zeros) { return ops::diagonal_scatter(zeros, grad, offset, dim1, dim2); });
}
Tensor unfold_backward(const Tensor& grad, IntSpan input_sizes, int64_t dimension, int64_t size,
                       int64_t step) {
  if (input_sizes.empty()) return ops::reshape(grad, input_sizes);
  const int64_t d = wrap_dim(dimension, static_cast<int64_t>(input_sizes.size()));
  const Tensor positions = ops::arange_start(Scalar(int64_t{0}), Scalar(input_sizes[d]), Scalar(1),
                                             DType::Int64, grad.device());
  const Tensor index = ops::reshape(ops::unfold(positions, 0, size, step), Dims{-1});
  const Tensor windows = ops::flatten(ops::movedim(grad, Dims{-1}, Dims{d + 1}), d, d + 1);
  return ops::index_add(ops::zeros(input_sizes, grad.dtype(), grad.device()), d, index, windows,
                        Scalar(1));
}

/// A copy of self and all of its storage, with self's strides and offset.
static Tensor storage_clone(const Tensor& self) {
  if (self.storage_offset() == 0 && self.is_non_overlapping_and_dense())
    return ops::clone(self, std::nullopt);
  const Dims sizes(self.sizes()), strides(self.strides());
  const int64_t whole = static_cast<int64_t>(self.storage()->nbytes()) / self.itemsize();
  const Tensor flat = ops::clone(ops::as_strided(self, Dims{whole}, Dims{1}, 0), std::nullopt);
  return ops::as_strided(flat, sizes, strides, self.storage_offset());
}

Tensor as_strided_scatter(const Tensor& self, const Tensor& src, IntSpan size, IntSpan stride,
                          std::optional<int64_t> storage_offset) {
  // Strides and offset are those of self's own storage, of which the result has a copy.
  Tensor out = storage_clone(self);
  const Tensor target = ops::as_strided(out, size, stride, storage_offset);
  ops::copy_(target, src, false);
  return out;
}
Tensor slice_scatter(const Tensor& self, const Tensor& src, int64_t dim,
                     std::optional<int64_t> start, std::optional<int64_t> end, int64_t step) {
  Tensor out = ops::clone(self, std::nullopt);
  const Tensor target = ops::slice(out, dim, start, end, step);
  check(vt::equal(target.sizes(), src.sizes()),
        "expected src to have a size equal to the slice of self. src size = ", src.sizes(),
        ", slice size = ", target.sizes());
  ops::copy_(target, src, false);
  return out;
}
Tensor select_scatter(const Tensor& self, const Tensor& src, int64_t dim, int64_t index) {
  Tensor out = ops::clone(self, std::nullopt);
  const Tensor target = ops::select(out, dim, index);
  check(vt::equal(target.sizes(), src.sizes()),
        "expected src to have a size equal to the slice of self. src size = ", src.sizes(),
        ", slice size = ", target.sizes());
  ops::copy_(target, src, false);
  return out;
}
Tensor diagonal_scatter(const Tensor& self, const Tensor& src, int64_t offset, int64_t dim1,
                        int64_t dim2) {
  Tensor out = ops::clone(self, std::nullopt);
  const Tensor target = ops::diagonal(out, offset, dim1, dim2);
  check(vt::equal(target.sizes(), src.sizes()),
        "expected src to have a size equal to a diagonal of the input. src size = ", src.sizes(),
        ", diagonal size = ", target.sizes());
  ops::copy_(target, src, false);
  return out;
}

Tensor copy(const Tensor& self, const Tensor& src, bool non_blocking) {
  return ops::copy_(empty_like(self), ops::expand(src, self.sizes(), false), non_blocking);
}

Tensor sum_to_size(const Tensor& self, IntSpan size) {
  const int64_t lead = self.dim() - static_cast<int64_t>(size.size());
  check(lead >= 0, "size {", size, "} is not expandable to size {", self.sizes(), "}.");
  Dims reduced;
  for (int64_t d = 0; d < self.dim(); ++d) {
    const int64_t have = self.sizes()[d];
    if (d < lead) {
      reduced.push_back(d);
      continue;
    }
    const int64_t want = size[d - lead];
    check(want == have || want == 1, "size {", size, "} is not expandable to size {", self.sizes(),
          "}.");
    if (want == 1 && have != 1) reduced.push_back(d);
  }
  if (reduced.empty()) return self.dim() > 0 ? self : ops::sum(self, std::nullopt);
  Tensor out = ops::sum_dim(self, IntSpan(reduced), true, std::nullopt);
  return lead > 0 ? ops::view(out, size) : out;
}

}  // namespace vt::composite

namespace vt::meta {

Tensor _to_dtype(const Tensor& self, DType dtype) { return empty_like(self, dtype); }

}  // namespace vt::meta
