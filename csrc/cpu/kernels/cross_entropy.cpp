// Cross entropy of rows of logits with class indices: forward keeps one log-sum-exp a row, backward
// writes softmax − onehot straight from the logits. No (N, C) array is kept between the two.
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

void forward(const Tensor& loss, const Tensor& lse, const Tensor& total_weight, const Tensor& self,
             const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
             double smoothing) {
  const int64_t rows = self.sizes()[0], classes = self.sizes()[1];
  visit_float(compute_type(self), [&]<class T>() {
    const Tensor x = dense(self), index = dense_as(target, DType::Int64),
                 w_dense = dense_as(weight, DTypeOf<T>::value);
    const int64_t* targets = index.data_as<int64_t>();
    const T* w = w_dense.defined() ? w_dense.data_as<T>() : nullptr;
    const T eps = static_cast<T>(smoothing);
    const T all_weights = w ? row_sum(w, classes) : static_cast<T>(classes);
    T* lses = lse.data_as<T>();
    const Tensor each = empty(Dims{2, rows}, DTypeOf<T>::value);
    T* losses = each.data_as<T>();
    T* weights = losses + rows;
    parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
      T* buffer = x.dtype() == DTypeOf<T>::value ? nullptr : scratch<T>(Scratch::Row0, classes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = targets[i];
        if (t == ignore_index) {
          losses[i] = weights[i] = lses[i] = T(0);
          continue;
        }
        check_index(t >= 0 && t < classes, "Target ", t, " is out of bounds.");
        const T* row = load_row<T>(x.data(), x.dtype(), i * classes, classes, buffer);
        const T top = row_max(row, classes);
        lses[i] = top + std::log(row_exp_sum(row, top, classes));
        weights[i] = w ? w[t] : T(1);
        losses[i] = (T(1) - eps) * weights[i] * (lses[i] - row[t]);
        if (eps != 0)
          losses[i] +=
              eps / static_cast<T>(classes) * (all_weights * lses[i] - dot_or_sum(row, w, classes));
      }
    });
    const T total = row_sum(weights, rows);
    *total_weight.data_as<T>() = total;
    if (reduction == kNone) {
      if (loss.dtype() == DTypeOf<T>::value)
        std::copy(losses, losses + rows, loss.data_as<T>());
      else
        store_row<T>(loss.data(), loss.dtype(), 0, rows, losses);
      return;
    }
    const T sum = row_sum(losses, rows);
    const T result = reduction == kMean ? sum / total : sum;
    if (loss.dtype() == DTypeOf<T>::value)
      *loss.data_as<T>() = result;
    else
      store_row<T>(loss.data(), loss.dtype(), 0, 1, &result);
  });
}

void backward(const Tensor& grad_input, const Tensor& grad, const Tensor& self,
              const Tensor& target, const Tensor& weight, int64_t reduction, int64_t ignore_index,
              double smoothing, const Tensor& lse, const Tensor& total_weight) {
  const int64_t rows = self.sizes()[0], classes = self.sizes()[1];
  visit_float(compute_type(self), [&]<class T>() {
    const Tensor x = dense(self), index = dense_as(target, DType::Int64),
                 w_dense = dense_as(weight, DTypeOf<T>::value);
    const Tensor g = dense_as(grad, DTypeOf<T>::value);
    const int64_t* targets = index.data_as<int64_t>();
    const T* w = w_dense.defined() ? w_dense.data_as<T>() : nullptr;
    const T* gs = g.data_as<T>();
    const T* lses = lse.data_as<T>();
    const T eps = static_cast<T>(smoothing), spread = eps / static_cast<T>(classes);
    const T all_weights = w ? row_sum(w, classes) : static_cast<T>(classes);
    const T divisor = reduction == kMean ? *total_weight.data_as<T>() : T(1);
    parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
      const bool typed = x.dtype() == DTypeOf<T>::value;
      T* buffer = typed ? nullptr : scratch<T>(Scratch::Row0, classes);
      T* out_buffer = typed ? nullptr : scratch<T>(Scratch::Row1, classes);
      for (int64_t i = begin; i < end; ++i) {
        T* out = row_target<T>(grad_input.data(), grad_input.dtype(), i * classes, out_buffer);
        const int64_t t = targets[i];
        if (t == ignore_index) {
          std::fill(out, out + classes, T(0));
        } else {
          const T* row = load_row<T>(x.data(), x.dtype(), i * classes, classes, buffer);
          const T scale = gs[reduction == kNone ? i : 0] / divisor;
          const T wt = (w ? w[t] : T(1)) * (T(1) - eps) * scale;
          const T factor = wt + spread * all_weights * scale, shift = lses[i];
          for (int64_t c = 0; c < classes; ++c) out[c] = exp_nonpositive(row[c] - shift) * factor;
          if (eps != 0) {
            for (int64_t c = 0; c < classes; ++c) out[c] -= spread * scale * (w ? w[c] : T(1));
          }
          out[t] -= wt;
        }
        store_row<T>(grad_input.data(), grad_input.dtype(), i * classes, classes, out);
      }
    });
  });
}

const RegisterCpu register_cross_entropy([](KernelTable& t) {
  t._cross_entropy_index = forward;
  t._cross_entropy_index_backward = backward;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
