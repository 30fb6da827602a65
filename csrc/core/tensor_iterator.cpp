#include "core/tensor_iterator.h"

#include <numeric>

#include "core/overlap.h"
#include "core/parallel.h"

namespace vt {
namespace {

/// Promotion category: 0 bool, 1 integer, 2 float.
int category(DType dtype) { return is_floating(dtype) ? 2 : dtype == DType::Bool ? 0 : 1; }

struct ResultTypeState {
  DType dims = DType::Bool, zero_dim = DType::Bool, wrapped = DType::Bool;
  bool has_dims = false, has_zero_dim = false, has_wrapped = false;

  void add(const Tensor& t) {
    DType dtype = t.dtype();
    auto merge = [](bool& has, DType& into, DType value) {
      into = has ? promote_types(into, value) : value;
      has = true;
    };
    if (t.impl()->wrapped_number) {
      if (is_floating(dtype)) dtype = default_dtype();
      merge(has_wrapped, wrapped, dtype);
    } else if (t.dim() == 0) {
      merge(has_zero_dim, zero_dim, dtype);
    } else {
      merge(has_dims, dims, dtype);
    }
  }

  static DType combine(bool has_high, DType high, bool has_low, DType low) {
    if (!has_high) return low;
    if (!has_low) return high;
    return category(low) > category(high) ? promote_types(high, low) : high;
  }
  DType result() const {
    const DType low = combine(has_zero_dim, zero_dim, has_wrapped, wrapped);
    return combine(has_dims, dims, has_zero_dim || has_wrapped, low);
  }
};

/// What computes has no loops for 8-bit floats.
void refuse_float8(DType dtype, std::string_view op) {
  if (is_float8(dtype)) [[unlikely]]
    dtype_not_supported(dtype, op);
}

}  // namespace

void dtype_not_supported(DType dtype, std::string_view op) {
  fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for '", scalar_type_name(dtype),
       "'",
       is_float8(dtype) ? ": 8-bit floats are stored, converted and multiplied by "
                          "torch._scaled_mm; for other ops convert with .to(torch.float32) first"
                        : "");
}

DType result_type(std::span<const Tensor* const> inputs) {
  ResultTypeState state;
  for (const Tensor* t : inputs) state.add(*t);
  return state.result();
}

namespace {

/// The first dimension, counted from the last, in which two shapes do not fit; -1 if they do.
int64_t mismatch(IntSpan a, IntSpan b) {
  const size_t common = std::min(a.size(), b.size());
  for (size_t i = 0; i < common; ++i) {
    const int64_t x = a[a.size() - 1 - i], y = b[b.size() - 1 - i];
    if (x != y && x != 1 && y != 1) return static_cast<int64_t>(i);
  }
  return -1;
}

[[noreturn]] void cannot_broadcast(IntSpan a, IntSpan b, std::string_view what) {
  const auto from_last = static_cast<size_t>(mismatch(a, b));
  fail("The size of tensor a (", a[a.size() - 1 - from_last], ") must match the size of tensor b (",
       b[b.size() - 1 - from_last], ") at non-singleton dimension ",
       std::max(a.size(), b.size()) - 1 - from_last, " (", what, ")");
}

}  // namespace

Dims broadcast_shapes(IntSpan a, IntSpan b) {
  if (mismatch(a, b) >= 0) cannot_broadcast(a, b, str("shapes ", a, " and ", b));
  const IntSpan longer = a.size() >= b.size() ? a : b;
  const IntSpan shorter = a.size() >= b.size() ? b : a;
  Dims out(longer);
  const size_t lead = longer.size() - shorter.size();
  for (size_t i = 0; i < shorter.size(); ++i) {
    int64_t& extent = out[lead + i];
    if (shorter[i] != 1) extent = shorter[i];
  }
  return out;
}

Dims broadcast_shapes(std::span<const Tensor* const> inputs, std::string_view op) {
  Dims shape(inputs[0]->sizes());
  for (size_t i = 1; i < inputs.size(); ++i) {
    if (equal(shape, inputs[i]->sizes())) continue;
    if (mismatch(shape, inputs[i]->sizes()) >= 0) [[unlikely]] {
      std::string operands;
      for (const Tensor* t : inputs)
        operands += str(operands.empty() ? "" : ", ", t->dtype(), t->sizes());
      cannot_broadcast(shape, inputs[i]->sizes(), str(op, " of ", operands));
    }
    shape = broadcast_shapes(shape, inputs[i]->sizes());
  }
  return shape;
}

Device common_device(std::span<const Tensor* const> tensors, std::string_view op) {
  Device device;
  bool found = false;
  for (const Tensor* t : tensors) {
    if (!t->defined() || (t->dim() == 0 && t->device().is_cpu())) continue;
    if (!found) {
      device = t->device();
      found = true;
    } else if (!(device == t->device())) [[unlikely]] {
      fail(op, ": Expected all tensors to be on the same device, but found at least two devices, ",
           device, " and ", t->device(), "! Move one with .to(device).");
    }
  }
  if (!found && !tensors.empty() && tensors[0]->defined()) device = tensors[0]->device();
  return device;
}

void TensorIterator::check_devices(std::span<const Tensor* const> inputs,
                                   std::span<Tensor* const> outputs, const IterConfig& config) {
  bool same = true;
  device_ = inputs.empty() ? outputs[0]->device() : inputs[0]->device();
  for (const Tensor* t : inputs) same &= t->device() == device_;
  for (const Tensor* t : outputs) same &= !t->defined() || t->device() == device_;
  if (same) [[likely]]
    return;
  SmallVector<const Tensor*, kMaxOperands> all;
  for (const Tensor* t : outputs) {
    if (t->defined()) all.push_back(t);
  }
  all.append(inputs.begin(), inputs.end());
  device_ = common_device({all.data(), all.size()}, config.op);
  for (const Tensor* t : outputs) {
    check(!t->defined() || t->device() == device_, config.op, ": the output is on ",
          t->defined() ? t->device() : device_, " but the inputs are on ", device_);
  }
}

void TensorIterator::compute_dtypes(std::span<Tensor* const> outputs,
                                    std::span<const Tensor* const> inputs,
                                    const IterConfig& config) {
  if (config.promote == Promote::None) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      operands_[outputs.size() + i].compute_dtype = inputs[i]->dtype();
    }
    output_dtype_ =
        config.output_dtype.value_or(inputs.empty() ? DType::Float32 : inputs[0]->dtype());
    return;
  }
  DType common = inputs[0]->dtype();
  bool simple = !inputs[0]->impl()->wrapped_number;
  for (size_t i = 1; i < inputs.size(); ++i) simple &= inputs[i]->dtype() == common;
  if (!simple) common = result_type(inputs);
  for (const Tensor* t : inputs) refuse_float8(t->dtype(), config.op);
  if (config.promote == Promote::Float && !is_floating(common)) common = default_dtype();
  for (size_t i = 0; i < inputs.size(); ++i) operands_[outputs.size() + i].compute_dtype = common;
  output_dtype_ = config.output_dtype.value_or(common);
  if (!config.check_output_cast) return;
  for (const Tensor* out : outputs) {
    if (out->defined() && out->dtype() != output_dtype_) {
      refuse_float8(out->dtype(), config.op);
      check(can_cast(output_dtype_, out->dtype()), config.op, ": result type ", output_dtype_,
            " can't be cast to the desired output type ", out->dtype());
    }
  }
}

bool TensorIterator::build_flat(std::span<Tensor* const> outputs,
                                std::span<const Tensor* const> inputs) {
  // The common case: everything has one shape and is row-major, or is a single element.
  const Tensor* lead = inputs[0];
  for (const Tensor* t : inputs) {
    if (t->dim() > lead->dim()) lead = t;
  }
  const IntSpan shape = lead->sizes();
  auto fits = [&](const Tensor& t) { return t.is_contiguous() && equal(t.sizes(), shape); };
  for (const Tensor* t : inputs) {
    if (!(t == lead || t->dim() == 0 || fits(*t))) return false;
  }
  if (!lead->is_contiguous()) return false;
  for (const Tensor* t : outputs) {
    if (t->defined() && !fits(*t)) return false;
  }
  ndim_ = 1;
  numel_ = lead->numel();
  shape_[0] = numel_;
  for (Tensor* t : outputs) {
    if (!t->defined()) *t = empty(shape, output_dtype_, device_);
    add(t, true);
    strides_[num_operands_ - 1][0] = t->itemsize();
  }
  for (const Tensor* t : inputs) {
    add(const_cast<Tensor*>(t), false);
    strides_[num_operands_ - 1][0] = t->numel() == 1 && numel_ != 1 ? 0 : t->itemsize();
  }
  return true;
}

void TensorIterator::add(Tensor* tensor, bool is_output) {
  Operand& op = operands_[num_operands_];
  op.data = static_cast<char*>(tensor->data());
  op.dtype = tensor->dtype();
  op.is_output = is_output;
  op.on_host = device_.is_cuda() && tensor->device().is_cpu();
  op.is_number = tensor->impl()->wrapped_number;
  op.strides = strides_[num_operands_];
  if (is_output) op.compute_dtype = output_dtype_;
  ++num_operands_;
  num_outputs_ += is_output;
}

void TensorIterator::build(std::span<Tensor* const> outputs, std::span<const Tensor* const> inputs,
                           const IterConfig& config) {
  num_operands_ = num_outputs_ = 0;
  check_devices(inputs, outputs, config);
  compute_dtypes(outputs, inputs, config);
  if (config.check_overlap) {
    for (const Tensor* out : outputs) {
      if (!out->defined()) continue;
      check_no_internal_overlap(*out);
      for (const Tensor* in : inputs) check_no_partial_overlap(*out, *in);
    }
  }
  if (!inputs.empty() && build_flat(outputs, inputs)) return;

  Dims shape;
  if (inputs.empty()) {
    shape.assign(outputs[0]->sizes());
  } else {
    shape = broadcast_shapes(inputs, config.op);
  }
  const int ndim = static_cast<int>(shape.size());
  for (const Tensor* out : outputs) {
    check(!out->defined() || equal(out->sizes(), shape), config.op, ": output with shape ",
          out->defined() ? out->sizes() : IntSpan(shape), " doesn't match the broadcast shape ",
          shape);
  }
  ndim_ = ndim;
  numel_ = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  // Fastest dimension first: iterator dimension d is tensor dimension ndim-1-d.
  for (int d = 0; d < ndim; ++d) shape_[d] = shape[ndim - 1 - d];

  const int first_input = static_cast<int>(outputs.size());
  auto fill_strides = [&](int operand, const Tensor& t) {
    const int lead = ndim - static_cast<int>(t.dim());
    for (int d = 0; d < ndim; ++d) {
      const int dim = ndim - 1 - d - lead;
      const bool fixed = dim < 0 || (t.sizes()[dim] == 1 && shape_[d] != 1);
      strides_[operand][d] = fixed ? 0 : t.strides()[dim] * t.itemsize();
    }
  };
  for (size_t i = 0; i < inputs.size(); ++i)
    fill_strides(first_input + static_cast<int>(i), *inputs[i]);

  // Order dimensions by the inputs' strides (and those of given outputs), then let outputs that
  // must be allocated follow that order: the result keeps the layout of what it came from.
  int perm[kMaxDims];
  for (int d = 0; d < ndim; ++d) perm[d] = d;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i]->defined()) fill_strides(static_cast<int>(i), *outputs[i]);
  }
  const int total = first_input + static_cast<int>(inputs.size());
  auto should_swap = [&](int a, int b) {
    // 1: dimension a moves slower than b, so they swap; -1: in order; 0: undecided.
    for (int op = 0; op < total; ++op) {
      if (op < first_input && !outputs[op]->defined()) continue;
      const int64_t sa = strides_[op][a], sb = strides_[op][b];
      if (sa == 0 || sb == 0) continue;
      if (sa != sb) return sa < sb ? -1 : 1;
      if (shape_[a] > shape_[b]) return 1;
    }
    return 0;
  };
  for (int i = 1; i < ndim; ++i) {
    int dim1 = i;
    for (int dim0 = i - 1; dim0 >= 0; --dim0) {
      const int order = should_swap(perm[dim0], perm[dim1]);
      if (order > 0) {
        std::swap(perm[dim0], perm[dim1]);
        dim1 = dim0;
      } else if (order < 0) {
        break;
      }
    }
  }

  for (size_t i = 0; i < outputs.size(); ++i) {
    Tensor* out = outputs[i];
    if (!out->defined()) {
      Dims out_strides;
      out_strides.resize(ndim);
      int64_t step = 1;
      for (int d = 0; d < ndim; ++d) {
        out_strides[ndim - 1 - perm[d]] = step;
        step *= std::max<int64_t>(shape_[perm[d]], 1);
      }
      *out = empty_strided(shape, out_strides, output_dtype_, device_);
    }
    add(out, true);
    fill_strides(static_cast<int>(i), *out);
  }
  for (const Tensor* in : inputs) add(const_cast<Tensor*>(in), false);

  int64_t ordered[kMaxDims];
  auto apply = [&](int64_t* values) {
    for (int d = 0; d < ndim; ++d) ordered[d] = values[perm[d]];
    std::copy(ordered, ordered + ndim, values);
  };
  for (int op = 0; op < num_operands_; ++op) apply(strides_[op]);
  apply(shape_);
  order_and_merge();
}

void TensorIterator::unary(Tensor& out, const Tensor& a, const IterConfig& config) {
  Tensor* outs[] = {&out};
  const Tensor* ins[] = {&a};
  build(outs, ins, config);
}
void TensorIterator::binary(Tensor& out, const Tensor& a, const Tensor& b,
                            const IterConfig& config) {
  Tensor* outs[] = {&out};
  const Tensor* ins[] = {&a, &b};
  build(outs, ins, config);
}
void TensorIterator::row(std::span<const RowOperand> operands, int64_t n) {
  check(operands.size() <= kMaxOperands, "a row of ", operands.size(), " operands");
  ndim_ = 1;
  numel_ = shape_[0] = n;
  num_operands_ = static_cast<int>(operands.size());
  num_outputs_ = 1;
  device_ = Device{};
  for (size_t i = 0; i < operands.size(); ++i) {
    const RowOperand& from = operands[i];
    operands_[i] = {from.data, from.dtype,     from.compute_dtype, i == 0,
                    false,     from.is_number, strides_[i]};
    strides_[i][0] = from.stride;
  }
  output_dtype_ = operands[0].compute_dtype;
}

void TensorIterator::order_and_merge() {
  // Dimensions of extent 1 vanish; neighbours merge where every operand steps evenly over both.
  int kept = 0;
  for (int d = 0; d < ndim_; ++d) {
    if (shape_[d] == 1) continue;
    bool merge = kept > 0;
    for (int op = 0; merge && op < num_operands_; ++op) {
      merge = strides_[op][kept - 1] * shape_[kept - 1] == strides_[op][d];
    }
    if (merge) {
      shape_[kept - 1] *= shape_[d];
      continue;
    }
    shape_[kept] = shape_[d];
    for (int op = 0; op < num_operands_; ++op) strides_[op][kept] = strides_[op][d];
    ++kept;
  }
  if (kept == 0) {
    shape_[0] = numel_;
    for (int op = 0; op < num_operands_; ++op) strides_[op][0] = item_size(operands_[op].dtype);
    kept = 1;
  }
  ndim_ = kept;
}

void TensorIterator::serial_for_each(Loop loop, int64_t begin, int64_t end) const {
  if (begin >= end) return;
  char* data[kMaxOperands];
  int64_t inner[kMaxOperands];
  int64_t counter[kMaxDims];
  int64_t rest = begin;
  for (int d = 0; d < ndim_; ++d) {
    counter[d] = rest % shape_[d];
    rest /= shape_[d];
  }
  for (int op = 0; op < num_operands_; ++op) {
    data[op] = operands_[op].data;
    inner[op] = strides_[op][0];
    for (int d = 0; d < ndim_; ++d) data[op] += counter[d] * strides_[op][d];
  }
  while (begin < end) {
    const int64_t n = std::min(shape_[0] - counter[0], end - begin);
    loop(data, inner, n);
    begin += n;
    if (begin >= end) return;
    for (int op = 0; op < num_operands_; ++op) data[op] -= counter[0] * inner[op];
    counter[0] = 0;
    for (int d = 1; d < ndim_; ++d) {
      if (++counter[d] < shape_[d]) {
        for (int op = 0; op < num_operands_; ++op) data[op] += strides_[op][d];
        break;
      }
      counter[d] = 0;
      for (int op = 0; op < num_operands_; ++op) data[op] -= (shape_[d] - 1) * strides_[op][d];
    }
  }
}

void TensorIterator::for_each(Loop loop, int64_t grain) const {
  if (numel_ == 0) return;
  if (numel_ <= grain) {
    if (ndim_ == 1) {
      char* data[kMaxOperands];
      int64_t inner[kMaxOperands];
      for (int op = 0; op < num_operands_; ++op) {
        data[op] = operands_[op].data;
        inner[op] = strides_[op][0];
      }
      loop(data, inner, numel_);
      return;
    }
    serial_for_each(loop, 0, numel_);
    return;
  }
  parallel_for(0, numel_, grain,
               [&](int64_t begin, int64_t end) { serial_for_each(loop, begin, end); });
}

}  // namespace vt
