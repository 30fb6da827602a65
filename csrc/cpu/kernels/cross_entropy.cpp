// Cross entropy of rows of logits with class indices: forward keeps one log-sum-exp a row, backward
// writes softmax − onehot straight from the logits. No (N, C) array is kept between the two. Where
// the loss's gradient is known beforehand, one op does both, in place.
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

DType compute_type(const Tensor& t) {
  return t.dtype() == DType::Float64 ? DType::Float64 : DType::Float32;
}

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

template <class T>
T dot_or_sum(const T* x, const T* w, int64_t n) {
  return w ? row_dot(x, w, n) : row_sum(x, n);
}

/// The operands as dense rows, and what one row's loss and gradient take.
template <class T>
struct Problem {
  Tensor x, index, weights;
  int64_t rows, classes, ignored;
  T eps, spread, all_weights;

  Problem(const Tensor& self, const Tensor& target, const Tensor& weight, int64_t ignore_index,
          double smoothing)
      : x(dense(self)),
        index(dense_as(target, DType::Int64)),
        weights(dense_as(weight, DTypeOf<T>::value)),
        rows(self.sizes()[0]),
        classes(self.sizes()[1]),
        ignored(ignore_index),
        eps(static_cast<T>(smoothing)),
        spread(eps / static_cast<T>(classes)),
        all_weights(w() ? row_sum(w(), classes) : static_cast<T>(classes)) {}

  const T* w() const { return weights.defined() ? weights.data_as<T>() : nullptr; }
  bool typed() const { return x.dtype() == DTypeOf<T>::value; }
  int64_t target(int64_t row) const {
    const int64_t t = index.data_as<int64_t>()[row];
    check_index((t >= 0 && t < classes) || t == ignored, "Target ", t, " is out of bounds.");
    return t;
  }
  /// 0 for ignored rows.
  T weight_of(int64_t t) const { return t == ignored ? T(0) : w() ? w()[t] : T(1); }

  /// The loss of a row that is not ignored, and its log-sum-exp.
  T loss(const T* row, int64_t t, T& lse) const {
    const T top = row_max(row, classes);
    lse = top + std::log(row_exp_sum(row, top, classes));
    T loss = (T(1) - eps) * weight_of(t) * (lse - row[t]);
    if (eps != 0)
      loss += eps / static_cast<T>(classes) * (all_weights * lse - dot_or_sum(row, w(), classes));
    return loss;
  }
  /// The gradient of a row times `scale`; `out` may be `row`.
  void gradient(T* out, const T* row, int64_t t, T lse, T scale) const {
    const T wt = (w() ? w()[t] : T(1)) * (T(1) - eps) * scale;
    const T factor = wt + spread * all_weights * scale;
    for (int64_t c = 0; c < classes; ++c) out[c] = exp_nonpositive(row[c] - lse) * factor;
    if (eps != 0) {
      for (int64_t c = 0; c < classes; ++c) out[c] -= spread * scale * (w() ? w()[c] : T(1));
    }
    out[t] -= wt;
  }
};

/// Of every row's loss, in its own dtype.
template <class T>
void store_loss(const Tensor& loss, const T* losses, int64_t rows, T total, int64_t reduction) {
  T result = 0;
  if (reduction != kNone) {
    const T sum = row_sum(losses, rows);
    result = reduction == kMean ? sum / total : sum;
    losses = &result;
    rows = 1;
  }
  if (loss.dtype() == DTypeOf<T>::value)
    std::copy(losses, losses + rows, loss.data_as<T>());
  else
    store_row<T>(loss.data(), loss.dtype(), 0, rows, losses);
}

void forward(const Tensor& loss, const Tensor& lse, const Tensor& total_weight, const Tensor& self,
             const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
             double smoothing) {
  visit_float(compute_type(self), [&]<class T>() {
    const Problem<T> p(self, target, weight, ignore_index, smoothing);
    T* lses = lse.data_as<T>();
    const Tensor each = empty(Dims{2, p.rows}, DTypeOf<T>::value);
    T* losses = each.data_as<T>();
    T* weights = losses + p.rows;
    parallel_for(0, p.rows, row_grain(p.classes), [&](int64_t begin, int64_t end) {
      T* buffer = p.typed() ? nullptr : scratch<T>(Scratch::Row0, p.classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = p.target(i);
        weights[i] = p.weight_of(t);
        if (t == ignore_index) {
          losses[i] = lses[i] = T(0);
          continue;
        }
        const T* row = load_row<T>(p.x.data(), p.x.dtype(), i * p.classes, p.classes, buffer);
        losses[i] = p.loss(row, t, lses[i]);
      }
    });
    const T total = row_sum(weights, p.rows);
    *total_weight.data_as<T>() = total;
    store_loss(loss, losses, p.rows, total, reduction);
  });
}

void backward(const Tensor& grad_input, const Tensor& grad, const Tensor& self,
              const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
              double smoothing, const Tensor& lse, const Tensor& total_weight) {
  visit_float(compute_type(self), [&]<class T>() {
    const Problem<T> p(self, target, weight, ignore_index, smoothing);
    const Tensor g = dense_as(grad, DTypeOf<T>::value);
    const T* gs = g.data_as<T>();
    const T* lses = lse.data_as<T>();
    const T divisor = reduction == kMean ? *total_weight.data_as<T>() : T(1);
    parallel_for(0, p.rows, row_grain(p.classes), [&](int64_t begin, int64_t end) {
      T* buffer = p.typed() ? nullptr : scratch<T>(Scratch::Row0, p.classes);
      T* out_buffer = p.typed() ? nullptr : scratch<T>(Scratch::Row1, p.classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * p.classes, t = p.index.template data_as<int64_t>()[i];
        T* out = row_target<T>(grad_input.data(), grad_input.dtype(), at, out_buffer);
        if (t == ignore_index) {
          std::fill(out, out + p.classes, T(0));
        } else {
          const T* row = load_row<T>(p.x.data(), p.x.dtype(), at, p.classes, buffer);
          p.gradient(out, row, t, lses[i], gs[reduction == kNone ? i : 0] / divisor);
        }
        store_row<T>(grad_input.data(), grad_input.dtype(), at, p.classes, out);
      }
    });
  });
}

/// Both in one pass over the logits; `grad` may be their place. Targets are checked before anything
/// is written.
void loss_and_gradient(const Tensor& loss, const Tensor& grad, const Tensor& self,
                       const Tensor& target, const Tensor& weight, int64_t reduction,
                       int64_t ignore_index, double smoothing, const Tensor& grad_output, DType) {
  visit_float(compute_type(self), [&]<class T>() {
    const Problem<T> p(self, target, weight, ignore_index, smoothing);
    const Tensor g = dense_as(grad_output, DTypeOf<T>::value);
    const T* gs = g.data_as<T>();
    const Tensor each = empty(Dims{2, p.rows}, DTypeOf<T>::value);
    T* losses = each.data_as<T>();
    T* weights = losses + p.rows;
    for (int64_t i = 0; i < p.rows; ++i) weights[i] = p.weight_of(p.target(i));
    const T total = row_sum(weights, p.rows), divisor = reduction == kMean ? total : T(1);
    parallel_for(0, p.rows, row_grain(p.classes), [&](int64_t begin, int64_t end) {
      T* buffer = p.typed() ? nullptr : scratch<T>(Scratch::Row0, p.classes);
      T* out_buffer = p.typed() ? nullptr : scratch<T>(Scratch::Row1, p.classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * p.classes, t = p.target(i);
        T* out = row_target<T>(grad.data(), grad.dtype(), at, out_buffer);
        if (t == ignore_index) {
          losses[i] = T(0);
          std::fill(out, out + p.classes, T(0));
        } else {
          const T* row = load_row<T>(p.x.data(), p.x.dtype(), at, p.classes, buffer);
          T lse = 0;
          losses[i] = p.loss(row, t, lse);
          p.gradient(out, row, t, lse, gs[reduction == kNone ? i : 0] / divisor);
        }
        store_row<T>(grad.data(), grad.dtype(), at, p.classes, out);
      }
    });
    store_loss(loss, losses, p.rows, total, reduction);
  });
}

const RegisterCpu register_cross_entropy([](KernelTable& t) {
  t._cross_entropy_index = forward;
  t._cross_entropy_index_backward = backward;
  t._cross_entropy_index_gradient = loss_and_gradient;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
