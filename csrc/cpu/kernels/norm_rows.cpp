// layer_norm and rms_norm, forward and backward. Statistics are two-pass in the row's compute
// type; weight gradients are summed over fixed groups of rows, so they do not depend on threads.
#include "core/tensor_lists.h"
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

DType compute_type(const Tensor& t) {
  return t.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}

template <class T>
void normalise(T* y, const T* x, T mean, T rstd, const T* weight, const T* bias, int64_t n) {
  if (weight && bias) {
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  } else if (weight) {
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * weight[i];
  } else if (bias) {
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd + bias[i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd;
  }
}

/// out = x + y, whose sum it returns; out may be x or y.
template <class T>
T add_rows(T* out, const T* x, const T* y, int64_t n) {
  return sum_over<T>(
      n,
      [&](int64_t i) {
        const Vector<T> sum = load(x + i) + load(y + i);
        store(out + i, sum);
        return sum;
      },
      [&](int64_t i) { return out[i] = x[i] + y[i]; });
}

/// What a row is rounded to before the next op of several in one reads it.
template <class T>
void round_to(DType dtype, T* row, T* buffer, int64_t n) {
  if (dtype == DTypeOf<T>::value) return;
  store_block<T>(reinterpret_cast<char*>(buffer), item_size(dtype), row, n, dtype);
  load_row<T>(buffer, dtype, 0, n, row);
}

/// With a `residual`, of input + residual, which goes to `sum`; its rows may be fewer, and come
/// again.
template <bool kCentre>
void forward(const Tensor& out, const Tensor* mean_out, const Tensor& rstd_out, const Tensor& input,
             int64_t n, const Tensor& weight, const Tensor& bias, double eps,
             const Tensor& residual = Tensor(), const Tensor& sum = Tensor()) {
  if (input.numel() == 0) return;
  const int64_t rows = input.numel() / n;
  const int64_t added_rows = residual.defined() ? residual.numel() / n : 1;
  visit_float(compute_type(sum.defined() ? sum : input), [&]<class T>() {
    constexpr DType kType = DTypeOf<T>::value;
    const Tensor x = dense(input), r = dense(residual), w_dense = dense_as(weight, kType),
                 b_dense = dense_as(bias, kType);
    const T* w = w_dense.defined() ? w_dense.data_as<T>() : nullptr;
    const T* b = b_dense.defined() ? b_dense.data_as<T>() : nullptr;
    T* means = kCentre ? mean_out->data_as<T>() : nullptr;
    T* rstds = rstd_out.data_as<T>();
    const bool typed_sum = sum.defined() && sum.dtype() == kType;
    parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
      T* in_row = x.dtype() == kType ? nullptr : scratch<T>(Scratch::Row0, n);
      T* out_row = out.dtype() == kType ? nullptr : scratch<T>(Scratch::Row1, n);
      T* added_row = r.defined() && r.dtype() != kType ? scratch<T>(Scratch::Row2, n) : nullptr;
      T* sum_row = sum.defined() && !typed_sum ? scratch<T>(Scratch::Row3, n) : nullptr;
      for (int64_t i = begin; i < end; ++i) {
        const T* row = load_row<T>(x.data(), x.dtype(), i * n, n, in_row);
        T mean = 0;
        if (sum.defined()) {
          const T* added = load_row<T>(r.data(), r.dtype(), i % added_rows * n, n, added_row);
          T* total = row_target<T>(sum.data(), sum.dtype(), i * n, sum_row);
          mean = add_rows(total, row, added, n);
          store_row<T>(sum.data(), sum.dtype(), i * n, n, total);
          row = load_row<T>(sum.data(), sum.dtype(), i * n, n, sum_row);
        }
        if (!typed_sum) mean = kCentre ? row_sum(row, n) : T(0);
        mean = kCentre ? mean / static_cast<T>(n) : T(0);
        const T variance = row_square_deviation(row, mean, n) / static_cast<T>(n);
        const T rstd = T(1) / std::sqrt(variance + static_cast<T>(eps));
        if constexpr (kCentre) means[i] = mean;
        rstds[i] = rstd;
        T* y = row_target<T>(out.data(), out.dtype(), i * n, out_row);
        normalise(y, row, mean, rstd, w, b, n);
        store_row<T>(out.data(), out.dtype(), i * n, n, y);
      }
    });
  });
}

/// Sums over rows, a group of rows at a time.
template <class T>
struct RowGroups {
  int64_t groups, per_group;
  /// most: 0, or how many there may be.
  RowGroups(int64_t rows, int64_t n, int64_t most) {
    groups = std::clamp<int64_t>(rows * n / 32768, 1, std::min<int64_t>(rows, 16));
    if (most > 0) groups = std::min(groups, most);
    per_group = (rows + groups - 1) / groups;
  }
};

/// Writes the sum of the groups, or with `parts` each of them as a row of `out`; other rows are 0.
template <class T>
void store_group_sums(const Tensor& out, const T* partial, int64_t groups, int64_t step, int64_t n,
                      int64_t parts) {
  if (parts > 0) {
    T* rows = out.data_as<T>();
    for (int64_t k = 0; k < parts; ++k) {
      if (k < groups)
        std::copy(partial + k * step, partial + k * step + n, rows + k * n);
      else
        std::fill(rows + k * n, rows + (k + 1) * n, T(0));
    }
    return;
  }
  T* total = scratch<T>(Scratch::Extra, n);
  std::copy(partial, partial + n, total);
  for (int64_t k = 1; k < groups; ++k) {
    for (int64_t i = 0; i < n; ++i) total[i] += partial[k * step + i];
  }
  if (out.dtype() == DTypeOf<T>::value)
    std::copy(total, total + n, out.data_as<T>());
  else
    store_row<T>(out.data(), out.dtype(), 0, n, total);
}

/// The gradient is grad_out plus the `terms`, in the input's dtype. With a `residual`, the input's
/// gradient is added to that, and the sum also goes to `low`. With `parts` the gradients of weight
/// and bias are so many rows, to be added up.
template <bool kCentre>
void backward(const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias,
              const Tensor& grad_out, const Tensor& input, int64_t n, const Tensor* mean,
              const Tensor& rstd, const Tensor& weight, const Tensor& residual = Tensor(),
              const Tensor& low = Tensor(), TensorSpan terms = {}, int64_t parts = 0) {
  const auto zero = [](const Tensor& t) {
    if (t.defined() && t.numel() > 0)
      std::memset(t.data(), 0, static_cast<size_t>(t.numel() * t.itemsize()));
  };
  if (input.numel() == 0) {
    zero(grad_weight);
    zero(grad_bias);
    return;
  }
  const int64_t rows = input.numel() / n;
  visit_float(compute_type(input), [&]<class T>() {
    // A narrower gradient is widened row by row.
    const bool narrower = grad_out.itemsize() < input.itemsize();
    const Tensor x = dense(input),
                 g = narrower ? dense(grad_out) : dense_as(grad_out, input.dtype()),
                 added = dense(residual), w_dense = dense_as(weight, DTypeOf<T>::value);
    std::vector<Tensor> more;
    for (const Tensor& term : terms) more.push_back(dense(term));
    const T* w = w_dense.defined() ? w_dense.data_as<T>() : nullptr;
    const T* rstds = rstd.data_as<T>();
    const T* means = kCentre ? mean->data_as<T>() : nullptr;
    const bool want_weight = grad_weight.defined(), want_bias = grad_bias.defined();
    const bool typed = x.dtype() == DTypeOf<T>::value;
    const RowGroups<T> plan(rows, n, parts);
    const Tensor partial =
        want_weight || want_bias ? empty(Dims{plan.groups, 2, n}, DTypeOf<T>::value) : Tensor();
    parallel_chunks(plan.groups, [&](int64_t group) {
      T* in_row = typed ? nullptr : scratch<T>(Scratch::Row0, n);
      const bool typed_grad = g.dtype() == DTypeOf<T>::value && more.empty();
      T* g_row = typed_grad ? nullptr : scratch<T>(Scratch::Row1, n);
      T* term_row = more.empty() ? nullptr : scratch<T>(Scratch::Gradients, n);
      T* out_row = typed && !added.defined() ? nullptr : scratch<T>(Scratch::Row2, n);
      T* added_row = typed || !added.defined() ? nullptr : scratch<T>(Scratch::Row3, n);
      T* __restrict__ dw = partial.defined() ? partial.data_as<T>() + group * 2 * n : nullptr;
      T* __restrict__ db = dw ? dw + n : nullptr;
      if (dw) std::fill(dw, dw + 2 * n, T(0));
      const int64_t last = std::min(rows, (group + 1) * plan.per_group);
      for (int64_t i = group * plan.per_group; i < last; ++i) {
        const T* row = load_row<T>(x.data(), x.dtype(), i * n, n, in_row);
        const T* dy = load_row<T>(g.data(), g.dtype(), i * n, n, g_row);
        for (const Tensor& term : more) {
          add_rows(g_row, dy, load_row<T>(term.data(), term.dtype(), i * n, n, term_row), n);
          if (!typed) round_to(x.dtype(), g_row, scratch<T>(Scratch::Extra, n), n);
          dy = g_row;
        }
        const T m = kCentre ? means[i] : T(0), r = rstds[i];
        if (want_weight && want_bias) {
          for (int64_t k = 0; k < n; ++k) {
            dw[k] += dy[k] * ((row[k] - m) * r);
            db[k] += dy[k];
          }
        } else if (want_weight) {
          for (int64_t k = 0; k < n; ++k) dw[k] += dy[k] * ((row[k] - m) * r);
        } else if (want_bias) {
          for (int64_t k = 0; k < n; ++k) db[k] += dy[k];
        }
        const T along =
            w ? sum_over<T>(
                    n, [&](int64_t k) { return load(dy + k) * load(w + k) * (load(row + k) - m); },
                    [&](int64_t k) { return dy[k] * w[k] * (row[k] - m); })
              : sum_over<T>(
                    n, [&](int64_t k) { return load(dy + k) * (load(row + k) - m); },
                    [&](int64_t k) { return dy[k] * (row[k] - m); });
        T constant = 0;
        if constexpr (kCentre) constant = w ? row_dot(dy, w, n) : row_sum(dy, n);
        constant /= static_cast<T>(n);
        const T slope = along * r * r / static_cast<T>(n);
        T* dx = added.defined()
                    ? out_row
                    : row_target<T>(grad_input.data(), grad_input.dtype(), i * n, out_row);
        if (w) {
          for (int64_t k = 0; k < n; ++k)
            dx[k] = r * (dy[k] * w[k] - constant - (row[k] - m) * slope);
        } else {
          for (int64_t k = 0; k < n; ++k) dx[k] = r * (dy[k] - constant - (row[k] - m) * slope);
        }
        if (added.defined()) {
          if (!typed) round_to(grad_input.dtype(), dx, scratch<T>(Scratch::Extra, n), n);
          const T* r = load_row<T>(added.data(), added.dtype(), i * n, n, added_row);
          T* total = row_target<T>(grad_input.data(), grad_input.dtype(), i * n, dx);
          for (int64_t k = 0; k < n; ++k) total[k] = r[k] + dx[k];
          dx = total;
        }
        store_row<T>(grad_input.data(), grad_input.dtype(), i * n, n, dx);
        if (low.defined()) {
          if (!typed) round_to(grad_input.dtype(), dx, scratch<T>(Scratch::Extra, n), n);
          store_block<T>(static_cast<char*>(low.data()) + i * n * low.itemsize(), low.itemsize(),
                         dx, n, low.dtype());
        }
      }
    });
    if (want_weight)
      store_group_sums(grad_weight, partial.data_as<T>(), plan.groups, 2 * n, n, parts);
    if (want_bias)
      store_group_sums(grad_bias, partial.data_as<T>() + n, plan.groups, 2 * n, n, parts);
  });
}

/// The sums over the rows of `of`, where they are wanted; with `parts` as the first of so many
/// rows.
void sum_rows(Tensor out, const Tensor& of, int64_t n, int64_t parts) {
  if (!out.defined()) return;
  if (parts > 0) {
    std::memset(out.data(), 0, static_cast<size_t>(out.numel() * out.itemsize()));
    out = make_view(out, Dims{n}, Dims{1}, out.storage_offset());
  }
  const Tensor rows =
      make_view(of, Dims{n == 0 ? 0 : of.numel() / n, n}, Dims{n, 1}, of.storage_offset());
  const int64_t over[] = {0};
  const std::optional<DType> dtype = parts > 0 ? std::optional(out.dtype()) : std::nullopt;
  kernels_for(DeviceType::CPU).sum_dim(out, rows, IntSpan(over), false, dtype);
}

/// The sums over the rows of each matrix as the first of its parts; the others are 0.
void row_parts(const Tensor& out, const Tensor& self, int64_t parts) {
  std::memset(out.data(), 0, static_cast<size_t>(out.numel() * out.itemsize()));
  if (self.numel() == 0) return;
  const int64_t batch = self.dim() == 3 ? self.sizes()[0] : 1, n = self.sizes().back();
  const Dims sizes{self.sizes()[self.dim() - 2], n};
  const Dims strides{self.strides()[self.dim() - 2], self.strides().back()};
  const int64_t step = self.dim() == 3 ? self.strides()[0] : 0, over[] = {0};
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor to = make_view(out, Dims{n}, Dims{1}, out.storage_offset() + b * parts * n);
    const Tensor from = make_view(self, sizes, strides, self.storage_offset() + b * step);
    kernels_for(DeviceType::CPU).sum_dim(to, from, IntSpan(over), false, out.dtype());
  }
}

/// The rows of each tensor's parts, the first one to the last.
void add_parts(TensorSpan self, TensorSpan parts) {
  check_parts(self, parts);
  for (size_t i = 0; i < self.size(); ++i) {
    visit_float(parts[i].dtype(), [&]<class T>() {
      const int64_t rows = parts[i].sizes()[0], n = parts[i].sizes()[1];
      if (rows == 0)
        std::memset(self[i].data(), 0, static_cast<size_t>(n * self[i].itemsize()));
      else
        store_group_sums(self[i], parts[i].data_as<T>(), rows, n, n, 0);
    });
  }
}

const RegisterCpu register_norms([](KernelTable& t) {
  t._row_parts = row_parts;
  t._add_parts_ = add_parts;
  t.native_layer_norm = [](const Tensor& out, const Tensor& mean, const Tensor& rstd,
                           const Tensor& input, IntSpan normalized_shape, const Tensor& weight,
                           const Tensor& bias, double eps) {
    forward<true>(out, &mean, rstd, input, product_of(normalized_shape), weight, bias, eps);
  };
  t.native_layer_norm_backward =
      [](const Tensor& grad_input, const Tensor& grad_weight, const Tensor& grad_bias,
         const Tensor& grad_out, const Tensor& input, IntSpan normalized_shape, const Tensor& mean,
         const Tensor& rstd, const Tensor& weight, const Tensor&) {
        backward<true>(grad_input, grad_weight, grad_bias, grad_out, input,
                       product_of(normalized_shape), &mean, rstd, weight);
      };
  t._rms_norm = [](const Tensor& out, const Tensor& rstd, const Tensor& input,
                   IntSpan normalized_shape, const Tensor& weight, double eps) {
    forward<false>(out, nullptr, rstd, input, product_of(normalized_shape), weight, Tensor(), eps);
  };
  t._rms_norm_backward = [](const Tensor& grad_input, const Tensor& grad_weight,
                            const Tensor& grad_out, const Tensor& input, IntSpan normalized_shape,
                            const Tensor& rstd, const Tensor& weight) {
    backward<false>(grad_input, grad_weight, Tensor(), grad_out, input,
                    product_of(normalized_shape), nullptr, rstd, weight);
  };
  t._residual_layer_norm = [](const Tensor& out, const Tensor& sum, const Tensor& mean,
                              const Tensor& rstd, const Tensor& self, const Tensor& residual,
                              IntSpan normalized_shape, const Tensor& weight, const Tensor& bias,
                              double eps, DType) {
    forward<true>(out, &mean, rstd, self, product_of(normalized_shape), weight, bias, eps, residual,
                  sum);
  };
  t._residual_rms_norm = [](const Tensor& out, const Tensor& sum, const Tensor& rstd,
                            const Tensor& self, const Tensor& residual, IntSpan normalized_shape,
                            const Tensor& weight, double eps, DType) {
    forward<false>(out, nullptr, rstd, self, product_of(normalized_shape), weight, Tensor(), eps,
                   residual, sum);
  };
  t._residual_layer_norm_backward =
      [](const Tensor& total, const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& low,
         const Tensor& row_sums, const Tensor& grad_out, const Tensor& residual,
         const Tensor& input, IntSpan normalized_shape, const Tensor& mean, const Tensor& rstd,
         const Tensor& weight, const Tensor&, std::optional<DType>, TensorSpan terms, bool,
         int64_t parts) {
        const int64_t n = product_of(normalized_shape);
        backward<true>(total, grad_weight, grad_bias, grad_out, input, n, &mean, rstd, weight,
                       residual, low, terms, parts);
        sum_rows(row_sums, low.defined() ? low : total, n, parts);
      };
  t._residual_rms_norm_backward =
      [](const Tensor& total, const Tensor& grad_weight, const Tensor& low, const Tensor& row_sums,
         const Tensor& grad_out, const Tensor& residual, const Tensor& input,
         IntSpan normalized_shape, const Tensor& rstd, const Tensor& weight, std::optional<DType>,
         TensorSpan terms, bool, int64_t parts) {
        const int64_t n = product_of(normalized_shape);
        backward<false>(total, grad_weight, Tensor(), grad_out, input, n, nullptr, rstd, weight,
                        residual, low, terms, parts);
        sum_rows(row_sums, low.defined() ? low : total, n, parts);
      };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
