// Factories: an empty tensor and a fill.
#include <cmath>

#include "dispatch/default_device.h"
#include "dispatch/thread_state.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {
namespace {

Tensor filled(Tensor out, const Scalar& value) {
  const NoGrad no_grad;
  return ops::fill_(out, wrapped_scalar(value));
}

Tensor like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
            std::optional<MemoryFormat> format) {
  const DType type = dtype.value_or(self.dtype());
  const Device where = device.value_or(self.device());
  if (format && *format != MemoryFormat::Preserve)
    return vt::empty(self.sizes(), type, where, *format);
  return vt::empty_like(self, type, where);
}

DType scalar_dtype(const Scalar& value, std::optional<DType> dtype) {
  return dtype.value_or(value.dtype(default_dtype()));
}

}  // namespace

Tensor empty(IntSpan size, std::optional<DType> dtype, std::optional<Device> device,
             std::optional<MemoryFormat> format) {
  return vt::empty(size, dtype.value_or(default_dtype()), device.value_or(default_device()),
                   format.value_or(MemoryFormat::Contiguous));
}
Tensor empty_strided(IntSpan size, IntSpan stride, std::optional<DType> dtype,
                     std::optional<Device> device) {
  return vt::empty_strided(size, stride, dtype.value_or(default_dtype()),
                           device.value_or(default_device()));
}
Tensor zeros(IntSpan size, std::optional<DType> dtype, std::optional<Device> device) {
  return filled(vt::empty(size, dtype.value_or(default_dtype()), device.value_or(default_device())),
                Scalar(0));
}
Tensor ones(IntSpan size, std::optional<DType> dtype, std::optional<Device> device) {
  return filled(vt::empty(size, dtype.value_or(default_dtype()), device.value_or(default_device())),
                Scalar(1));
}
Tensor full(IntSpan size, const Scalar& fill_value, std::optional<DType> dtype,
            std::optional<Device> device) {
  return filled(vt::empty(size, scalar_dtype(fill_value, dtype), device.value_or(default_device())),
                fill_value);
}
Tensor empty_like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
                  std::optional<MemoryFormat> format) {
  return like(self, dtype, device, format);
}
Tensor zeros_like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
                  std::optional<MemoryFormat> format) {
  return filled(like(self, dtype, device, format), Scalar(0));
}
Tensor ones_like(const Tensor& self, std::optional<DType> dtype, std::optional<Device> device,
                 std::optional<MemoryFormat> format) {
  return filled(like(self, dtype, device, format), Scalar(1));
}
Tensor full_like(const Tensor& self, const Scalar& fill_value, std::optional<DType> dtype,
                 std::optional<Device> device, std::optional<MemoryFormat> format) {
  return filled(like(self, dtype, device, format), fill_value);
}
Tensor new_empty(const Tensor& self, IntSpan size, std::optional<DType> dtype,
                 std::optional<Device> device) {
  return vt::empty(size, dtype.value_or(self.dtype()), device.value_or(self.device()));
}
Tensor new_zeros(const Tensor& self, IntSpan size, std::optional<DType> dtype,
                 std::optional<Device> device) {
  return filled(new_empty(self, size, dtype, device), Scalar(0));
}
Tensor new_ones(const Tensor& self, IntSpan size, std::optional<DType> dtype,
                std::optional<Device> device) {
  return filled(new_empty(self, size, dtype, device), Scalar(1));
}
Tensor new_full(const Tensor& self, IntSpan size, const Scalar& fill_value,
                std::optional<DType> dtype, std::optional<Device> device) {
  return filled(new_empty(self, size, dtype, device), fill_value);
}
Tensor scalar_tensor(const Scalar& s, std::optional<DType> dtype, std::optional<Device> device) {
  return filled(vt::empty({}, dtype.value_or(default_dtype()), device.value_or(default_device())),
                s);
}

Tensor arange(const Scalar& end, std::optional<DType> dtype, std::optional<Device> device) {
  return arange_start(end.is_float() ? Scalar(0.0) : Scalar(int64_t{0}), end, Scalar(int64_t{1}),
                      dtype, device);
}
Tensor arange_start(const Scalar& start, const Scalar& end, const Scalar& step,
                    std::optional<DType> dtype, std::optional<Device> device) {
  const bool floating = start.is_float() || end.is_float() || step.is_float();
  check(step.to_double() != 0, "step must be nonzero");
  check(std::isfinite(start.to_double()) && std::isfinite(end.to_double()),
        "unsupported range: ", start, " -> ", end);
  check((step.to_double() > 0) == (end.to_double() >= start.to_double()) ||
            end.to_double() == start.to_double(),
        "upper bound and lower bound inconsistent with step sign");
  const DType type = dtype.value_or(floating ? default_dtype() : DType::Int64);
  int64_t count;
  if (type == DType::Int64) {  // counts by the integer parts, exactly
    for (const Scalar& number : {start, end, step}) check_fits(number, type);
    const int64_t span = end.to_int() - start.to_int(), by = step.to_int();
    check_value(by != 0, "step must be nonzero");
    count = (span + by - (by > 0 ? 1 : -1)) / by;
  } else {
    const double size = std::ceil((end.to_double() - start.to_double()) / step.to_double());
    check(size < 0x1p62, "arange: invalid size, possible overflow: ", size, " elements");
    count = static_cast<int64_t>(size);
  }
  const NoGrad no_grad;
  return ops::_arange_(
      vt::empty(Dims{std::max<int64_t>(count, 0)}, type, device.value_or(default_device())), start,
      step);
}

static Scalar end_value(const Tensor& t, std::string_view op) {
  check(t.dim() == 0, op, " only supports 0-dimensional start and end tensors, got shape ",
        t.sizes());
  return t.item();
}
Tensor linspace(const Tensor& start_at, const Tensor& end_at, int64_t steps,
                std::optional<DType> dtype, std::optional<Device> device) {
  const Scalar start = end_value(start_at, "linspace"), end = end_value(end_at, "linspace");
  check(steps >= 0, "number of steps must be non-negative");
  const NoGrad no_grad;
  const DType type = dtype.value_or(default_dtype());
  // Integer results take the integer parts of the ends.
  auto end_point = [type](const Scalar& x) {
    return is_floating(type) ? x.to_double() : static_cast<double>(x.to_int());
  };
  check_fits(start, type);
  check_fits(end, type);
  const double first = end_point(start), last = end_point(end);
  if (steps == 1) return filled(vt::empty(Dims{1}, type, device.value_or(default_device())), start);
  // Counted from both ends, so that both are exact.
  const double step = (last - first) / static_cast<double>(std::max<int64_t>(steps - 1, 1));
  Tensor out = vt::empty(Dims{steps}, DType::Float64, device.value_or(default_device()));
  ops::_arange_(out, Scalar(first), Scalar(step));
  const int64_t half = steps / 2;
  if (steps > 1) {
    const Tensor upper = ops::slice(out, 0, half, std::nullopt, 1);
    ops::_arange_(upper, Scalar(last - step * static_cast<double>(steps - half - 1)), Scalar(step));
    ops::fill_(ops::select(out, 0, -1), wrapped_scalar(Scalar(last)));
  }
  return type == DType::Float64 ? out : ops::_to_dtype(out, type);
}
Tensor logspace(const Tensor& start_at, const Tensor& end_at, int64_t steps, double base,
                std::optional<DType> dtype, std::optional<Device> device) {
  const Scalar start = end_value(start_at, "logspace"), end = end_value(end_at, "logspace");
  const NoGrad no_grad;
  const DType type = dtype.value_or(default_dtype());
  const bool whole = !is_floating(type);
  const Tensor powers = ops::linspace(wrapped_scalar(whole ? Scalar(start.to_int()) : start),
                                      wrapped_scalar(whole ? Scalar(end.to_int()) : end), steps,
                                      DType::Float64, device);
  return ops::_to_dtype(ops::pow(wrapped_scalar(Scalar(base)), powers), type);
}

Tensor eye(int64_t n, std::optional<int64_t> m, std::optional<DType> dtype,
           std::optional<Device> device) {
  check(n >= 0, "n must be greater or equal to 0, got ", n);
  check(m.value_or(0) >= 0, "m must be greater or equal to 0, got ", m.value_or(0));
  const NoGrad no_grad;
  Tensor out = ops::zeros(Dims{n, m.value_or(n)}, dtype, device);
  ops::fill_(ops::diagonal(out, 0, 0, 1), wrapped_scalar(Scalar(1)));
  return out;
}

namespace {

/// How many elements lie on and below the diagonal, without a look at each row. Overflow is an
/// error: no memory holds as many.
int64_t lower_count(int64_t rows, int64_t columns, int64_t offset) {
  const int64_t first = std::clamp<int64_t>(-offset, 0, rows);  // the first row that has any
  const int64_t whole = std::clamp<int64_t>(columns - offset, first, rows);  // from here on: all
  int64_t twice = 0, rest = 0, count = 0;
  const bool overflow =
      __builtin_mul_overflow(whole - first, first + whole + 2 * offset + 1, &twice) ||
      __builtin_mul_overflow(rows - whole, columns, &rest) ||
      __builtin_add_overflow(twice / 2, rest, &count);
  check(!overflow, "a triangle of ", rows, " rows and ", columns, " columns has too many elements");
  return count;
}

Tensor triangle_indices(int64_t rows, int64_t columns, int64_t offset, bool lower,
                        std::optional<DType> dtype, std::optional<Device> device) {
  check(rows >= 0 && columns >= 0, "row and column counts must be non-negative, got ", rows,
        " and ", columns);
  constexpr int64_t kMost = int64_t{1} << 60;  // sums of a few extents do not overflow
  check(rows <= kMost && columns <= kMost, "row and column counts are too large: ", rows, " and ",
        columns);
  offset = std::clamp(offset, -rows, columns);
  int64_t count = lower_count(rows, columns, lower ? offset : offset - 1);
  if (!lower) {
    int64_t all = 0;
    check(!__builtin_mul_overflow(rows, columns, &all), "a matrix of ", rows, " rows and ", columns,
          " columns has too many elements");
    count = all - count;
  }
  Tensor host = vt::empty(Dims{2, count}, DType::Int64);
  int64_t* row = host.data_as<int64_t>();
  int64_t* column = row + count;
  const int64_t* const end = column;
  for (int64_t r = lower ? std::max<int64_t>(-offset, 0) : 0; row < end; ++r) {
    const int64_t first = lower ? 0 : std::clamp<int64_t>(r + offset, 0, columns);
    const int64_t last = lower ? std::clamp<int64_t>(r + offset + 1, 0, columns) : columns;
    for (int64_t c = first; c < last; ++c) {
      *row++ = r;
      *column++ = c;
    }
  }
  const DType type = dtype.value_or(DType::Int64);
  if (type != DType::Int64) host = ops::_to_dtype(host, type);
  const Device where = device.value_or(default_device());
  if (where.is_cpu()) return host;
  return ops::copy_(vt::empty(host.sizes(), type, where), host, false);
}

}  // namespace

Tensor tril_indices(int64_t row, int64_t col, int64_t offset, std::optional<DType> dtype,
                    std::optional<Device> device) {
  return triangle_indices(row, col, offset, true, dtype, device);
}
Tensor triu_indices(int64_t row, int64_t col, int64_t offset, std::optional<DType> dtype,
                    std::optional<Device> device) {
  return triangle_indices(row, col, offset, false, dtype, device);
}
Tensor tril_(const Tensor& self, int64_t diagonal) {
  return ops::copy_(self, ops::tril(self, diagonal), false);
}
Tensor triu_(const Tensor& self, int64_t diagonal) {
  return ops::copy_(self, ops::triu(self, diagonal), false);
}

}  // namespace vt::composite
