#include "core/view_geometry.h"

namespace vt {

Dims infer_shape(IntSpan size, int64_t numel) {
  Dims shape(size);
  int64_t known = 1;
  int64_t unknown = -1;
  bool overflow = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1) {
      check(unknown < 0, "only one dimension can be inferred");
      unknown = static_cast<int64_t>(i);
    } else {
      check(shape[i] >= 0, "invalid shape dimension ", shape[i], " in shape ", size);
      overflow |= __builtin_mul_overflow(known, shape[i], &known);
    }
  }
  if (unknown >= 0 && !overflow) {
    check(known != 0 || numel != 0, "cannot reshape tensor of 0 elements into shape ", size,
          " because the unspecified dimension size -1 can be any value and is ambiguous");
    if (known != 0 && numel % known == 0) {
      shape[unknown] = numel / known;
      return shape;
    }
  }
  check(!overflow && unknown < 0 && known == numel, "shape '", size,
        "' is invalid for input of size ", numel);
  return shape;
}

std::optional<Dims> view_strides(IntSpan sizes, IntSpan strides, IntSpan shape) {
  const int64_t numel = product_of(sizes);
  if (numel == 0) return equal(sizes, shape) ? Dims(strides) : contiguous_strides(shape);
  Dims out;
  out.resize(shape.size());
  int64_t d = static_cast<int64_t>(shape.size()) - 1;
  // Walk runs of the old dimensions that are contiguous with each other; new dimensions must
  // each fit inside one run.
  int64_t run_stride = sizes.empty() ? 1 : strides.back();
  int64_t run = 1, filled = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    run *= sizes[i];
    const bool ends = i == 0 || (sizes[i - 1] != 1 && strides[i - 1] != run * run_stride);
    if (!ends) continue;
    while (d >= 0 && (filled < run || shape[d] == 1)) {
      out[d] = filled * run_stride;
      filled *= shape[d];
      --d;
    }
    if (filled != run) return std::nullopt;
    if (i > 0) {
      run_stride = strides[i - 1];
      run = filled = 1;
    }
  }
  for (; d >= 0; --d) {
    if (shape[d] != 1) return std::nullopt;
    out[d] = sizes.empty()                             ? 1
             : out.size() > static_cast<size_t>(d) + 1 ? out[d + 1] * shape[d + 1]
                                                       : 1;
  }
  return out;
}

Dims inverse_permutation(IntSpan dims) {
  Dims inverse;
  inverse.resize(dims.size());
  const auto n = static_cast<int64_t>(dims.size());
  for (int64_t i = 0; i < n; ++i) inverse[wrap_dim(dims[i], n)] = i;
  return inverse;
}

Tensor broadcast_to(const Tensor& src, IntSpan sizes) {
  const int64_t lead = static_cast<int64_t>(sizes.size()) - src.dim();
  bool fits = lead >= 0;
  Dims strides(sizes.size(), int64_t{0});
  for (int64_t d = 0; fits && d < src.dim(); ++d) {
    const int64_t extent = src.sizes()[d];
    fits = extent == sizes[lead + d] || extent == 1;
    if (extent != 1) strides[lead + d] = src.strides()[d];
  }
  check(fits, "copy_: a source of shape ", src.sizes(), " cannot be broadcast to shape ", sizes);
  return make_view(src, sizes, strides, src.storage_offset());
}

}  // namespace vt
