// Stacking, repeating, rolling, flipping and padding.
#include <algorithm>

#include "core/tensor_iterator.h"
#include "dispatch/thread_state.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor range(int64_t start, int64_t end, int64_t step, Device device) {
  return ops::arange_start(Scalar(start), Scalar(end), Scalar(step), DType::Int64, device);
}

Tensor number(int64_t value) { return wrapped_scalar(Scalar(value)); }

std::vector<Tensor> at_least(TensorSpan tensors, int64_t dims) {
  std::vector<Tensor> out;
  for (Tensor t : tensors) {
    if (t.dim() == 0) t = ops::reshape(t, Dims{1});
    if (dims >= 2 && t.dim() == 1) t = ops::unsqueeze(t, 0);
    if (dims >= 3 && t.dim() == 2) t = ops::unsqueeze(t, 2);
    out.push_back(t);
  }
  return out;
}

}  // namespace

Tensor stack(TensorSpan tensors, int64_t dim) {
  check(!tensors.empty(), "stack expects a non-empty TensorList");
  const int64_t d = wrap_dim(dim, tensors[0].dim() + 1);
  std::vector<Tensor> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check(vt::equal(tensors[i].sizes(), tensors[0].sizes()),
          "stack expects each tensor to be equal size, but got ", tensors[0].sizes(),
          " at entry 0 and ", tensors[i].sizes(), " at entry ", i);
    parts.push_back(ops::unsqueeze(tensors[i], d));
  }
  return ops::cat(parts, d);
}
Tensor hstack(TensorSpan tensors) {
  check(!tensors.empty(), "hstack expects a non-empty TensorList");
  const std::vector<Tensor> parts = at_least(tensors, 1);
  return ops::cat(parts, parts[0].dim() == 1 ? 0 : 1);
}
Tensor vstack(TensorSpan tensors) {
  check(!tensors.empty(), "vstack expects a non-empty TensorList");
  return ops::cat(at_least(tensors, 2), 0);
}
Tensor dstack(TensorSpan tensors) {
  check(!tensors.empty(), "dstack expects a non-empty TensorList");
  return ops::cat(at_least(tensors, 3), 2);
}

Tensor repeat(const Tensor& self, IntSpan repeats) {
  const int64_t n = static_cast<int64_t>(repeats.size()), lead = n - self.dim();
  check(
      lead >= 0,
      "Number of dimensions of repeat dims can not be smaller than number of dimensions of tensor");
  // Each dimension becomes (repeats, extent) and is merged again.
  Dims split, expanded, merged;
  for (int64_t d = 0; d < n; ++d) {
    const int64_t extent = d < lead ? 1 : self.sizes()[d - lead];
    check(repeats[d] >= 0, "Trying to create tensor with negative dimension ", repeats[d] * extent,
          ": ", repeats);
    split.push_back(1);
    split.push_back(extent);
    expanded.push_back(repeats[d]);
    expanded.push_back(extent);
    merged.push_back(repeats[d] * extent);
  }
  const Tensor view = ops::expand(ops::reshape(self, split), expanded, false);
  return ops::reshape(ops::clone(view, MemoryFormat::Contiguous), merged);
}
Tensor tile(const Tensor& self, IntSpan dims) {
  Dims repeats(dims);
  while (static_cast<int64_t>(repeats.size()) < self.dim()) repeats.insert(0, 1);
  return ops::repeat(self, repeats);
}
Tensor repeat_interleave(const Tensor& self, int64_t repeats, std::optional<int64_t> dim,
                         std::optional<int64_t> output_size) {
  check(repeats >= 0, "repeats can not be negative");
  const Tensor x = dim ? self : ops::reshape(self, Dims{-1});
  check(!output_size || *output_size == x.size(dim.value_or(0)) * repeats,
        "repeat_interleave: Invalid output_size, expected ", x.size(dim.value_or(0)) * repeats,
        " but got ", output_size.value_or(0));
  const int64_t d = wrap_dim(dim.value_or(0), x.dim());
  Dims expanded(x.sizes()), merged(x.sizes());
  expanded.insert(d + 1, repeats);
  merged[d] *= repeats;
  const Tensor view = ops::expand(ops::unsqueeze(x, d + 1), expanded, false);
  return ops::reshape(ops::clone(view, MemoryFormat::Contiguous), merged);
}
Tensor repeat_interleave_Tensor(const Tensor& self, const Tensor& repeats,
                                std::optional<int64_t> dim, std::optional<int64_t> output_size) {
  check(repeats.dtype() == DType::Int64 || repeats.dtype() == DType::Int32,
        "repeats has to be Long or Int tensor, got ", repeats.dtype());
  if (repeats.numel() == 1) {
    return ops::repeat_interleave(self, ops::reshape(repeats, Dims{}).item().to_int(), dim,
                                  output_size);
  }
  const Tensor x = dim ? self : ops::reshape(self, Dims{-1});
  const int64_t d = dim.value_or(0);
  check(repeats.dim() == 1 && repeats.numel() == x.size(d),
        "repeats must have the same size as input along dim, but got repeats.size(0) = ",
        repeats.numel(), " and input.size(", d, ") = ", x.size(d));
  const bool grad = thread_state.grad_enabled;
  const NoGrad no_grad;
  const Tensor counts = ops::contiguous(ops::_to_dtype(repeats, DType::Int64), std::nullopt);
  Tensor index = counts;
  if (counts.numel() > 0) {
    check(ops::amin(counts, {}, false).item().to_int() >= 0, "repeats can not be negative");
    // A mark where each entry starts in the result; their running sum is the entry's number, one
    // too high. The extra place takes the marks of entries without a copy at the end.
    const Tensor ends = ops::cumsum(counts, 0, std::nullopt);
    const int64_t total = ops::select(ends, 0, -1).item().to_int();
    check(!output_size || *output_size == total,
          "allocated size does not match required size: output_size is ", output_size.value_or(0),
          ", the repeats add up to ", total);
    const Tensor marks = ops::index_add_(
        ops::zeros(Dims{total + 1}, DType::Int64, x.device()), 0, ops::sub(ends, counts, Scalar(1)),
        ops::ones(counts.sizes(), DType::Int64, x.device()), Scalar(1));
    index = ops::sub(ops::slice(ops::cumsum(marks, 0, std::nullopt), 0, 0, total, 1), number(1),
                     Scalar(1));
  }
  const GradMode mode(grad);
  return ops::index_select(x, d, index);
}

Tensor roll(const Tensor& self, IntSpan shifts, IntSpan dims) {
  if (dims.empty()) {
    check(shifts.size() == 1, "`shifts` required with one entry when no dims are given");
    return ops::reshape(roll(ops::reshape(self, Dims{-1}), shifts, Dims{0}), self.sizes());
  }
  if (self.dim() == 0)
    check_index(dims.empty(), "Dimension specified as ", dims[0], " but tensor has no dimensions");
  check(shifts.size() == dims.size(), "shifts and dimensions must align. shifts: ", shifts.size(),
        ", dims:", dims.size());
  Tensor out = self;
  for (size_t i = 0; i < dims.size(); ++i) {
    const int64_t size = out.size(dims[i]);
    const int64_t cut = size == 0 ? 0 : ((size - shifts[i]) % size + size) % size;
    if (cut == 0) continue;
    const Tensor parts[] = {ops::slice(out, dims[i], cut, std::nullopt, 1),
                            ops::slice(out, dims[i], 0, cut, 1)};
    out = ops::cat(parts, dims[i]);
  }
  return out.is_same(self) ? ops::clone(self, std::nullopt) : out;
}

Tensor flip(const Tensor& self, IntSpan dims) {
  if (!self.is_contiguous() && self.is_non_overlapping_and_dense()) {
    // Dimensions as they lie in memory, so that the result lies as self does.
    Dims order, back, moved;
    for (int64_t d = 0; d < self.dim(); ++d) order.push_back(d);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return self.strides()[a] > self.strides()[b]; });
    back.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) back[order[i]] = static_cast<int64_t>(i);
    for (const int64_t d : dims) moved.push_back(back[wrap_dim(d, self.dim())]);
    const Tensor ordered = ops::permute(self, order);
    if (ordered.is_contiguous()) return ops::permute(ops::flip(ordered, moved), back);
  }
  Tensor out = self;
  uint64_t seen = 0;
  for (const int64_t d : dims) {
    const uint64_t bit = uint64_t{1} << wrap_dim(d, self.dim());
    check((seen & bit) == 0, "dim ", d, " appears multiple times in the list of dims");
    seen |= bit;
    if (self.dim() == 0) continue;
    out = ops::index_select(out, d, range(self.size(d) - 1, -1, -1, self.device()));
  }
  return out.is_same(self) ? ops::clone(self, std::nullopt) : out;
}
Tensor fliplr(const Tensor& self) {
  check(self.dim() >= 2, "Input must be >= 2-d.");
  return ops::flip(self, Dims{1});
}
Tensor flipud(const Tensor& self) {
  check(self.dim() >= 1, "Input must be >= 1-d.");
  return ops::flip(self, Dims{0});
}

Tensor constant_pad_nd(const Tensor& self, IntSpan pad, const Scalar& value) {
  check(pad.size() % 2 == 0, "Length of pad must be even but instead it equals ", pad.size());
  check(static_cast<int64_t>(pad.size() / 2) <= self.dim(),
        "Length of pad should be no more than twice the number of dimensions of the "
        "input. Pad length is ",
        pad.size(), " while the input has ", self.dim(), " dimensions.");
  Dims sizes(self.sizes());
  Tensor source = self;
  for (size_t i = 0; i < pad.size() / 2; ++i) {
    const int64_t d = self.dim() - 1 - static_cast<int64_t>(i);
    const int64_t before = pad[2 * i], after = pad[2 * i + 1];
    sizes[d] += before + after;
    check(sizes[d] >= 0, "The input size ", self.sizes()[d], ", plus negative padding ", before,
          " and ", after, " resulted in a negative output size, which is invalid. Check dimension ",
          d, " of your input.");
    // Negative widths cut the source.
    source = ops::slice(source, d, std::max<int64_t>(-before, 0),
                        self.sizes()[d] - std::max<int64_t>(-after, 0), 1);
  }
  Tensor out = ops::full(sizes, value, self.dtype(), self.device());
  Tensor middle = out;
  for (size_t i = 0; i < pad.size() / 2; ++i) {
    const int64_t d = self.dim() - 1 - static_cast<int64_t>(i);
    const int64_t start = std::max<int64_t>(pad[2 * i], 0);
    middle = ops::slice(middle, d, start, start + source.sizes()[d], 1);
  }
  ops::copy_(middle, source, false);
  return out;
}

Tensor pad(const Tensor& self, IntSpan widths, std::string_view mode, std::optional<double> value) {
  if (mode == "constant") {
    const double v = value.value_or(0.0);
    return ops::constant_pad_nd(
        self, widths, is_floating(self.dtype()) ? Scalar(v) : Scalar(static_cast<int64_t>(v)));
  }
  check(!value || *value == 0, "Padding mode \"", mode, "\" doesn't take in value argument");
  check(widths.size() % 2 == 0 && static_cast<int64_t>(widths.size() / 2) <= self.dim(),
        "Padding length must be divisible by 2 and at most "
        "twice the number of dimensions of the input (",
        self.dim(), "), got ", widths.size());
  Tensor out = self;
  for (size_t i = 0; i < widths.size() / 2; ++i) {
    const int64_t d = self.dim() - 1 - static_cast<int64_t>(i);
    const int64_t size = self.sizes()[d], before = widths[2 * i], after = widths[2 * i + 1];
    if (before == 0 && after == 0) continue;
    // A circular border repeats what is left after negative widths have cut.
    const int64_t cut = std::max<int64_t>(-before, 0),
                  kept = size - cut - std::max<int64_t>(-after, 0);
    Tensor index = range(-before, size + after, 1, self.device());
    if (mode == "replicate") {
      index = ops::clamp(index, number(0), number(size - 1));
    } else if (mode == "circular") {
      check(before <= size && after <= size,
            "Padding value causes wrapping around more than once.");
      check(kept > 0, "Negative padding value is resulting in an empty dimension");
      index = ops::add(ops::remainder(ops::sub(index, number(cut), Scalar(1)), number(kept)),
                       number(cut), Scalar(1));
    } else {
      check_value(mode == "reflect", "Unrecognised padding mode ", mode);
      check(before < size && after < size,
            "Argument #4: Padding size should be less than the corresponding input dimension, "
            "but got: padding (",
            before, ", ", after, ") at dimension ", d, " of input ", self.sizes());
      // Folded at both ends: |k|, then the same from the other side.
      const Tensor last = number(size - 1);
      index = ops::sub(last, ops::abs(ops::sub(last, ops::abs(index), Scalar(1))), Scalar(1));
    }
    out = ops::index_select(out, d, index);
  }
  return out;
}

Tensor broadcast_to(const Tensor& self, IntSpan size) { return ops::expand(self, size, false); }
std::vector<Tensor> broadcast_tensors(TensorSpan tensors) {
  if (tensors.empty()) return {};
  SmallVector<const Tensor*, 8> all;
  for (const Tensor& t : tensors) all.push_back(&t);
  const Dims shape =
      broadcast_shapes(std::span<const Tensor* const>(all.data(), all.size()), "broadcast_tensors");
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(ops::expand(t, shape, false));
  return out;
}
std::vector<Tensor> meshgrid(TensorSpan tensors, std::string_view indexing) {
  check(indexing == "ij" || indexing == "xy",
        "torch.meshgrid: indexing must be one of \"xy\" or \"ij\", but received: ", indexing);
  const size_t n = tensors.size();
  Dims shape;
  for (const Tensor& t : tensors) {
    check(t.dim() <= 1, "torch.meshgrid: Expected 0D or 1D tensor in the tensor list but got: ", t);
    shape.push_back(t.numel());
  }
  const bool swap = indexing == "xy" && n >= 2;
  if (swap) std::swap(shape[0], shape[1]);
  std::vector<Tensor> out;
  for (size_t i = 0; i < n; ++i) {
    Dims one(n, int64_t{1});
    const size_t d = swap && i < 2 ? 1 - i : i;
    one[d] = tensors[i].numel();
    out.push_back(ops::expand(ops::reshape(tensors[i], one), shape, false));
  }
  return out;
}
Tensor trace(const Tensor& self) {
  check(self.dim() == 2, "trace: expected a matrix, but got tensor with dim ", self.dim());
  return ops::sum(ops::diagonal(self, 0, 0, 1), std::nullopt);
}

}  // namespace vt::composite
