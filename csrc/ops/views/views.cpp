// Geometry of view ops: sizes, strides and offsets only.
#include "core/tensor_iterator.h"
#include "core/view_geometry.h"
#include "vt/meta_decls.h"

namespace vt::views {

Tensor view(const Tensor& self, IntSpan size) {
  const Dims shape = infer_shape(size, self.numel());
  const auto strides = view_strides(self.sizes(), self.strides(), shape);
  check(strides.has_value(),
        "view size is not compatible with input tensor's size and stride (at least one "
        "dimension spans across two contiguous subspaces). Use .reshape(...) instead. (view of "
        "shape ",
        self.sizes(), ", strides ", self.strides(), " as ", IntSpan(shape), ")");
  return make_view(self, shape, *strides, self.storage_offset());
}

Tensor view_dtype(const Tensor& self, DType dtype) {
  Dims sizes(self.sizes()), strides(self.strides());
  int64_t offset = self.storage_offset();
  const int64_t from = self.itemsize(), to = item_size(dtype);
  if (from != to) {
    const auto need = [&](bool holds, const auto&... what) {
      check(holds, what..., " to view ", self.dtype(), " as ", dtype,
            " (different element sizes), but got shape ", self.sizes(), ", strides ",
            self.strides(), " and storage offset ", self.storage_offset());
    };
    need(self.dim() > 0, "self.dim() cannot be 0");
    need(strides.back() == 1 || sizes.back() == 1, "self.stride(-1) must be 1");
    const int64_t ratio = std::max(from, to) / std::min(from, to);
    const auto scale = [&](int64_t& n, std::string_view name) {
      need(from > to || n % ratio == 0, name, " must be divisible by ", ratio);
      n = from > to ? n * ratio : n / ratio;
    };
    scale(sizes.back(), "self.size(-1)");
    scale(offset, "self.storage_offset()");
    for (size_t d = 0; d + 1 < strides.size(); ++d) scale(strides[d], "self.stride(d)");
    strides.back() = 1;
  }
  Tensor out = make_view(self, sizes, strides, offset);
  out.impl()->dtype = dtype;
  return out;
}

Tensor as_strided(const Tensor& self, IntSpan size, IntSpan stride,
                  std::optional<int64_t> storage_offset) {
  check(size.size() == stride.size(), "as_strided: mismatch in length of strides and shape: ", size,
        ", ", stride);
  const int64_t offset = storage_offset.value_or(self.storage_offset());
  check(offset >= 0, "as_strided: Tensor: invalid storage offset ", offset);
  for (const int64_t s : stride) {
    check(s >= 0,
          "as_strided: Negative strides are not supported at the moment, got strides: ", stride);
  }
  checked_numel(size);
  const int64_t needed = span_elements(size, stride);
  const int64_t available = static_cast<int64_t>(self.storage()->nbytes()) / self.itemsize();
  check(needed == 0 || needed + offset <= available, "setStorage: sizes ", size, ", strides ",
        stride, ", storage offset ", offset, ", and itemsize ", self.itemsize(),
        " requiring a storage size of ", (needed + offset) * self.itemsize(),
        " are out of bounds for storage of size ", self.storage()->nbytes());
  return make_view(self, size, stride, offset);
}

Tensor transpose(const Tensor& self, int64_t dim0, int64_t dim1) {
  const int64_t a = wrap_dim(dim0, self.dim()), b = wrap_dim(dim1, self.dim());
  Dims sizes(self.sizes()), strides(self.strides());
  if (a != b) {
    std::swap(sizes[a], sizes[b]);
    std::swap(strides[a], strides[b]);
  }
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor permute(const Tensor& self, IntSpan dims) {
  const int64_t n = self.dim();
  check(static_cast<int64_t>(dims.size()) == n,
        "permute(sparse_coo): number of dimensions in the tensor input does "
        "not match the length of the desired ordering of dimensions i.e. input.dim() = ",
        n, " is not equal to len(dims) = ", dims.size());
  Dims sizes, strides;
  uint64_t seen = 0;
  for (const int64_t d : dims) {
    const int64_t dim = wrap_dim(d, n);
    check((seen >> dim & 1) == 0, "permute(): duplicate dims are not allowed.");
    seen |= uint64_t{1} << dim;
    sizes.push_back(self.sizes()[dim]);
    strides.push_back(self.strides()[dim]);
  }
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor t(const Tensor& self) {
  check(self.dim() <= 2, "t() expects a tensor with <= 2 dimensions, but self is ", self.dim(),
        "D");
  return self.dim() < 2 ? vt::alias(self) : transpose(self, 0, 1);
}

Tensor expand(const Tensor& self, IntSpan size, bool) {
  const int64_t n = self.dim(), target = static_cast<int64_t>(size.size());
  check(target >= n, "expand(", self, ", size=", size, "): the number of sizes provided (", target,
        ") must be greater or equal to the number of dimensions in the tensor (", n, ")");
  Dims sizes, strides;
  for (int64_t i = 0; i < target; ++i) {
    const int64_t d = i - (target - n);
    const int64_t have = d >= 0 ? self.sizes()[d] : 1;
    int64_t want = size[i];
    if (want == -1) {
      check(d >= 0, "expand(", self, ", size=", size,
            "): the expanded size of the tensor (-1) isn't allowed in a "
            "leading, non-existing dimension ",
            i);
      want = have;
    }
    check(want >= 0, "expand(", self, ", size=", size, "): negative size ", want, " in dimension ",
          i);
    check(have == want || have == 1, "The expanded size of the tensor (", want,
          ") must match the existing size (", have, ") at non-singleton dimension ", i,
          ".  Target sizes: ", size, ".  Tensor sizes: ", self.sizes());
    sizes.push_back(want);
    strides.push_back(d >= 0 && have == want ? self.strides()[d] : 0);
  }
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor squeeze(const Tensor& self) {
  Dims sizes, strides;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (self.sizes()[d] == 1) continue;
    sizes.push_back(self.sizes()[d]);
    strides.push_back(self.strides()[d]);
  }
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor squeeze_dim(const Tensor& self, IntSpan dim) {
  uint64_t chosen = 0;
  for (const int64_t d : dim) {
    const int64_t wrapped = wrap_dim(d, self.dim());
    check((chosen >> wrapped & 1) == 0, "dim ", wrapped,
          " appears multiple times in the list of dims");
    chosen |= uint64_t{1} << wrapped;
  }
  Dims sizes, strides;
  for (int64_t d = 0; d < self.dim(); ++d) {
    if (self.sizes()[d] == 1 && (chosen >> d & 1)) continue;
    sizes.push_back(self.sizes()[d]);
    strides.push_back(self.strides()[d]);
  }
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor unsqueeze(const Tensor& self, int64_t dim) {
  const int64_t at = wrap_dim(dim, self.dim() + 1);
  Dims sizes(self.sizes()), strides(self.strides());
  const int64_t stride = at < self.dim() ? sizes[at] * strides[at] : 1;
  sizes.insert(at, 1);
  strides.insert(at, stride);
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor select(const Tensor& self, int64_t dim, int64_t index) {
  check_index(self.dim() > 0, "select() cannot be applied to a 0-dim tensor.");
  const int64_t d = wrap_dim(dim, self.dim());
  const int64_t size = self.sizes()[d];
  check_index(index >= -size && index < size, "select(): index ", index,
              " out of range for tensor of size ", self.sizes(), " at dimension ", d);
  Dims sizes(self.sizes()), strides(self.strides());
  const int64_t offset = self.storage_offset() + (index < 0 ? index + size : index) * strides[d];
  sizes.erase(d);
  strides.erase(d);
  return make_view(self, sizes, strides, offset);
}

Tensor slice(const Tensor& self, int64_t dim, std::optional<int64_t> start,
             std::optional<int64_t> end, int64_t step) {
  check(self.dim() > 0, "slice() cannot be applied to a 0-dim tensor.");
  check_value(step > 0, "slice step must be positive");
  const int64_t d = wrap_dim(dim, self.dim());
  const int64_t size = self.sizes()[d];
  auto clip = [size](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + size : i, 0, size); };
  const int64_t from = clip(start.value_or(0));
  const int64_t to = std::max(from, clip(end.value_or(size)));
  Dims sizes(self.sizes()), strides(self.strides());
  const int64_t offset = self.storage_offset() + from * strides[d];
  sizes[d] = (to - from + step - 1) / step;
  strides[d] *= step;
  return make_view(self, sizes, strides, offset);
}

Tensor diagonal(const Tensor& self, int64_t offset, int64_t dim1, int64_t dim2) {
  const int64_t a = wrap_dim(dim1, self.dim()), b = wrap_dim(dim2, self.dim());
  check(a != b, "diagonal dimensions cannot be identical ", dim1, ", ", dim2);
  Dims sizes(self.sizes()), strides(self.strides());
  const int64_t rows = sizes[a], columns = sizes[b];
  const int64_t length = std::max<int64_t>(
      offset >= 0 ? std::min(rows, columns - offset) : std::min(rows + offset, columns), 0);
  int64_t start = self.storage_offset();
  if (length > 0) start += offset >= 0 ? offset * strides[b] : -offset * strides[a];
  const int64_t step = strides[a] + strides[b];
  sizes.erase(std::max(a, b));
  strides.erase(std::max(a, b));
  sizes.erase(std::min(a, b));
  strides.erase(std::min(a, b));
  sizes.push_back(length);
  strides.push_back(step);
  return make_view(self, sizes, strides, start);
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  const int64_t d = wrap_dim(dimension, self.dim());
  const int64_t extent = self.dim() == 0 ? 1 : self.sizes()[d];
  check(size >= 0 && size <= extent, "maximum size for tensor at dimension ", d, " is ", extent,
        " but size is ", size);
  check(step > 0, "step is ", step, " but must be > 0");
  Dims sizes(self.sizes()), strides(self.strides());
  if (self.dim() == 0) {
    sizes.push_back(size);
    strides.push_back(1);
    return make_view(self, sizes, strides, self.storage_offset());
  }
  sizes.push_back(size);
  strides.push_back(strides[d]);
  sizes[d] = (extent - size) / step + 1;
  strides[d] *= step;
  return make_view(self, sizes, strides, self.storage_offset());
}

Tensor detach(const Tensor& self) { return vt::alias(self); }
Tensor alias(const Tensor& self) { return vt::alias(self); }

}  // namespace vt::views
