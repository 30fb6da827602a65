// Fused optimizer steps and the multi-tensor ops around them: one pass over all tensors, cut into
// fixed chunks that the threads share. Each tensor keeps its own dtype; arithmetic is in float, or
// double where the parameter is double.
#include <bit>

#include "core/random_rounding.h"
#include "core/tensor_lists.h"
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/row_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kChunk = 16384;  // elements a task handles
constexpr int64_t kPart = 512;     // elements converted at a time

struct Part {
  int64_t tensor, begin, end;
};
std::vector<Part> parts_of(TensorSpan tensors) {
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t at = 0; at < tensors[i].numel(); at += kChunk) {
      parts.push_back({static_cast<int64_t>(i), at, std::min(at + kChunk, tensors[i].numel())});
    }
  }
  return parts;
}

/// A tensor of the list as dense elements: itself, or a contiguous copy written back at the end.
class DenseList {
 public:
  DenseList(TensorSpan tensors, bool written) : original_(tensors), written_(written) {
    for (const Tensor& t : tensors)
      items_.push_back(t.is_non_overlapping_and_dense() && t.is_contiguous() ? t : dense(t));
  }
  const Tensor& operator[](int64_t i) const { return items_[static_cast<size_t>(i)]; }
  size_t size() const { return items_.size(); }
  void write_back() const {
    if (!written_) return;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (!items_[i].is_same(original_[i]))
        kernels_for(DeviceType::CPU).copy_(original_[i], items_[i], false);
    }
  }

 private:
  TensorSpan original_;
  std::vector<Tensor> items_;
  bool written_;
};

double number(const Tensor& t) { return load_scalar(t.data(), t.dtype()).to_double(); }
bool skipped(const Tensor& found_inf) { return found_inf.defined() && number(found_inf) != 0; }

/// `n` elements of `t` as T, in place where the dtype allows.
template <class T>
T* open_part(const Tensor& t, int64_t at, int64_t n, T* buffer) {
  return const_cast<T*>(load_row<T>(t.data(), t.dtype(), at, n, buffer));
}
template <class T>
void close_part(const Tensor& t, int64_t at, int64_t n, const T* row) {
  store_row<T>(t.data(), t.dtype(), at, n, row);
}

struct AdamSettings {
  double lr, beta1, beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled;
};

template <class T>
void adam_part(const AdamSettings& o, double step, T inverse_scale, int64_t n, T* __restrict__ p,
               T* __restrict__ g, T* __restrict__ m, T* __restrict__ v, T* __restrict__ top) {
  const T bias1 = static_cast<T>(1 - std::pow(o.beta1, step));
  const T root_bias2 = static_cast<T>(std::sqrt(1 - std::pow(o.beta2, step)));
  const T lr = static_cast<T>(o.lr), step_size = lr / bias1, eps = static_cast<T>(o.eps);
  const T beta2 = static_cast<T>(o.beta2), keep1 = static_cast<T>(1 - o.beta1),
          keep2 = static_cast<T>(1 - o.beta2);
  const T decay = static_cast<T>(o.weight_decay),
          shrink = static_cast<T>(1 - o.lr * o.weight_decay);
  const T sign = (o.maximize ? T(-1) : T(1)) * inverse_scale;
  const bool coupled = !o.decoupled && o.weight_decay != 0;  // 0 times infinity is no number
  const T factor = o.decoupled ? shrink : T(1);
  const T inverse_root = T(1) / root_bias2;
  if (o.amsgrad) {
    for (int64_t i = 0; i < n; ++i) {
      const T grad = g[i] * sign + (coupled ? decay * p[i] : T(0));
      m[i] += (grad - m[i]) * keep1;
      v[i] = v[i] * beta2 + keep2 * grad * grad;
      top[i] = top[i] > v[i] ? top[i] : v[i];
      p[i] = p[i] * factor - step_size * m[i] / (std::sqrt(top[i]) * inverse_root + eps);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T grad = g[i] * sign + (coupled ? decay * p[i] : T(0));
    m[i] += (grad - m[i]) * keep1;
    v[i] = v[i] * beta2 + keep2 * grad * grad;
    p[i] = p[i] * factor - step_size * m[i] / (std::sqrt(v[i]) * inverse_root + eps);
  }
}

/// `n` elements of a gradient times `factor`, written back and as they are stored.
template <class T>
void scale_part(const Tensor& grad, int64_t at, int64_t n, T factor, T* row) {
  for (int64_t i = 0; i < n; ++i) row[i] *= factor;
  close_part(grad, at, n, row);
  open_part(grad, at, n, row);
}

/// The gradient's elements: read from `source` where that is another tensor, times `factor` if
/// there is one, and written as the gradient's dtype has them.
template <class T>
T* open_gradient(const Tensor& grad, const Tensor& source, const double* factor, int64_t at,
                 int64_t n, T* buffer) {
  if (source.data() == grad.data()) {
    T* row = open_part(grad, at, n, buffer);
    if (factor) scale_part(grad, at, n, static_cast<T>(*factor), row);
    return row;
  }
  T* row = row_target<T>(grad.data(), grad.dtype(), at, buffer);
  load_block<T>(row, static_cast<const char*>(source.data()) + at * source.itemsize(),
                source.itemsize(), n, source.dtype(), DTypeOf<T>::value);
  scale_part(grad, at, n, factor ? static_cast<T>(*factor) : T(1), row);
  return row;
}

/// factor: null, or what the gradients are multiplied by first.
void adam(std::string_view op, TensorSpan self, TensorSpan grads, TensorSpan exp_avgs,
          TensorSpan exp_avg_sqs, TensorSpan max_exp_avg_sqs, TensorSpan state_steps,
          const AdamSettings& o, const Tensor& grad_scale, const Tensor& found_inf,
          const double* factor = nullptr, TensorSpan sources = {}) {
  check_lists(op, self.size(),
              {grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, sources});
  if (skipped(found_inf)) return;
  const double inverse_scale = grad_scale.defined() ? 1 / number(grad_scale) : 1;
  std::vector<double> steps;
  for (const Tensor& t : state_steps) steps.push_back(number(t));
  const bool apart = !sources.empty();
  const DenseList p(self, true), g(grads, grad_scale.defined() || factor || apart),
      m(exp_avgs, true), v(exp_avg_sqs, true), from(apart ? sources : grads, false);
  const DenseList top(max_exp_avg_sqs, true);
  const std::vector<Part> parts = parts_of(self);
  parallel_chunks(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const Part& part = parts[static_cast<size_t>(index)];
    const int64_t k = part.tensor;
    visit_float(p[k].dtype() == DType::Float64 ? DType::Float64 : DType::Float32, [&]<class T>() {
      T buffers[5][kPart];
      for (int64_t at = part.begin; at < part.end; at += kPart) {
        const int64_t n = std::min(kPart, part.end - at);
        T* pp = open_part(p[k], at, n, buffers[0]);
        T* pg = open_gradient(g[k], apart ? from[k] : g[k], factor, at, n, buffers[1]);
        T* pm = open_part(m[k], at, n, buffers[2]);
        T* pv = open_part(v[k], at, n, buffers[3]);
        T* pt = o.amsgrad ? open_part(top[k], at, n, buffers[4]) : nullptr;
        adam_part<T>(o, steps[static_cast<size_t>(k)], static_cast<T>(inverse_scale), n, pp, pg, pm,
                     pv, pt);
        close_part(p[k], at, n, pp);
        close_part(m[k], at, n, pm);
        close_part(v[k], at, n, pv);
        if (pt) close_part(top[k], at, n, pt);
        if (grad_scale.defined()) {
          for (int64_t i = 0; i < n; ++i) pg[i] *= static_cast<T>(inverse_scale);
          close_part(g[k], at, n, pg);
        }
      }
    });
  });
  for (const DenseList* list : {&p, &g, &m, &v, &top}) list->write_back();
}

void fused_adam(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                TensorSpan max_exp_avg_sqs, TensorSpan state_steps, const Tensor& lr,
                const Tensor& beta1, double beta2, double weight_decay, double eps, bool amsgrad,
                bool maximize, const Tensor& grad_scale, const Tensor& found_inf) {
  adam("_fused_adam_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
       {number(lr), number(beta1), beta2, weight_decay, eps, amsgrad, maximize, false}, grad_scale,
       found_inf);
}
void fused_adamw(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                 TensorSpan max_exp_avg_sqs, TensorSpan state_steps, const Tensor& lr,
                 const Tensor& beta1, double beta2, double weight_decay, double eps, bool amsgrad,
                 bool maximize, const Tensor& grad_scale, const Tensor& found_inf) {
  adam("_fused_adamw_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
       {number(lr), number(beta1), beta2, weight_decay, eps, amsgrad, maximize, true}, grad_scale,
       found_inf);
}

/// Stores floats as bfloat16, each up or down at random; `half` says which 16 of the bits drawn for
/// an element decide.
void close_part_at_random(const Tensor& t, int64_t at, int64_t n, const float* row,
                          const RoundingBits* bits, int half) {
  auto* out = static_cast<uint16_t*>(t.data()) + at;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = std::bit_cast<uint32_t>(row[i]);
    const uint32_t random = bits[i].word[half / 2] >> (half % 2 * 16);
    // A quiet NaN stays one when its lower bits go.
    out[i] = is_not_finite(value)
                 ? static_cast<uint16_t>(value >> 16 | (row[i] != row[i] ? 0x40u : 0u))
                 : round_at_random(value, random);
  }
}

void fused_adamw_stochastic(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs,
                            TensorSpan exp_avg_sqs, TensorSpan max_exp_avg_sqs,
                            TensorSpan state_steps, const Tensor& lr, const Tensor& beta1,
                            double beta2, double weight_decay, double eps, bool amsgrad,
                            bool maximize, const Tensor& grad_scale, const Tensor& found_inf,
                            const PhiloxArgs& rng) {
  constexpr std::string_view op = "_fused_adamw_stochastic_";
  check_lists(op, self.size(), {grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps});
  check_bfloat16(op, {self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs});
  if (skipped(found_inf)) return;
  const AdamSettings o{number(lr), number(beta1), beta2,    weight_decay,
                       eps,        amsgrad,       maximize, true};
  const float unscale =
      static_cast<float>(grad_scale.defined() ? 1 / number(grad_scale) : double{1});
  std::vector<double> steps;
  for (const Tensor& t : state_steps) steps.push_back(number(t));
  const DenseList p(self, true), g(grads, grad_scale.defined()), m(exp_avgs, true),
      v(exp_avg_sqs, true), top(max_exp_avg_sqs, true);
  std::vector<int64_t> first_chunk(self.size());
  int64_t chunks = 0;
  for (size_t i = 0; i < self.size(); ++i) {
    first_chunk[i] = chunks;
    chunks += (self[i].numel() + kRoundedChunk - 1) / kRoundedChunk;
  }
  static_assert(kRoundedChunk % kPart == 0 && kChunk % kRoundedChunk == 0 && kPart % 2 == 0);
  const std::vector<Part> parts = parts_of(self);
  parallel_chunks(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const Part& part = parts[static_cast<size_t>(index)];
    const int64_t k = part.tensor;
    float buffers[5][kPart];
    RoundingBits bits[kPart];
    for (int64_t at = part.begin; at < part.end; at += kPart) {
      const int64_t n = std::min(kPart, part.end - at);
      float* pp = open_part(p[k], at, n, buffers[0]);
      float* pg = open_part(g[k], at, n, buffers[1]);
      float* pm = open_part(m[k], at, n, buffers[2]);
      float* pv = open_part(v[k], at, n, buffers[3]);
      float* pt = amsgrad ? open_part(top[k], at, n, buffers[4]) : nullptr;
      adam_part<float>(o, steps[static_cast<size_t>(k)], unscale, n, pp, pg, pm, pv, pt);
      const uint64_t first =
          rng.offset +
          static_cast<uint64_t>((first_chunk[static_cast<size_t>(k)] * kRoundedChunk + at) / 2);
      for (int64_t i = 0; i < n; i += 2) {
        const Philox4 drawn = philox(rng.seed, first + static_cast<uint64_t>(i / 2));
        bits[i] = rounding_bits(drawn, 0);
        if (i + 1 < n) bits[i + 1] = rounding_bits(drawn, 1);
      }
      close_part_at_random(p[k], at, n, pp, bits, 0);
      close_part_at_random(m[k], at, n, pm, bits, 1);
      close_part_at_random(v[k], at, n, pv, bits, 2);
      if (pt) close_part_at_random(top[k], at, n, pt, bits, 3);
      if (grad_scale.defined()) {
        for (int64_t i = 0; i < n; ++i) pg[i] *= unscale;
        close_part(g[k], at, n, pg);
      }
    }
  });
  for (const DenseList* list : {&p, &g, &m, &v, &top}) list->write_back();
}

void scaled_adam(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                 TensorSpan max_exp_avg_sqs, TensorSpan state_steps, TensorSpan sources,
                 const Tensor& lr, const Tensor& factor, const Tensor& count, const Tensor& beta1,
                 double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                 bool decoupled) {
  if (count.defined()) {
    const double term = number(count);
    for (const Tensor& step : state_steps) {
      visit_float(step.dtype(), [&]<class T>() {
        T buffer[1];
        T* value = open_part(step, 0, 1, buffer);
        value[0] += static_cast<T>(term);
        close_part(step, 0, 1, value);
      });
    }
  }
  const double scale = factor.defined() ? number(factor) : 1;
  adam("_scaled_adam_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
       {number(lr), number(beta1), beta2, weight_decay, eps, amsgrad, maximize, decoupled},
       Tensor(), Tensor(), factor.defined() ? &scale : nullptr, sources);
}

void sgd(std::string_view op, TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
         double weight_decay, const Tensor& momentum, const Tensor& lr, double dampening,
         bool nesterov, bool maximize, bool is_first_step, const Tensor& grad_scale,
         const Tensor& found_inf, const double* factor = nullptr, TensorSpan sources = {}) {
  check_lists(op, self.size(), {grads, momentum_buffer_list, sources});
  if (skipped(found_inf)) return;
  const double inverse_scale = grad_scale.defined() ? 1 / number(grad_scale) : 1;
  const double rate = number(lr), momentum_now = number(momentum);
  const bool has_momentum = !momentum_buffer_list.empty();
  const bool apart = !sources.empty();
  const DenseList p(self, true), g(grads, grad_scale.defined() || factor || apart),
      b(momentum_buffer_list, true), from(apart ? sources : grads, false);
  const std::vector<Part> parts = parts_of(self);
  parallel_chunks(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const Part& part = parts[static_cast<size_t>(index)];
    const int64_t k = part.tensor;
    visit_float(p[k].dtype() == DType::Float64 ? DType::Float64 : DType::Float32, [&]<class T>() {
      T buffers[3][kPart];
      const T sign = maximize ? T(-1) : T(1), unscale = static_cast<T>(inverse_scale),
              decay = static_cast<T>(weight_decay);
      const bool decays = weight_decay != 0;  // 0 times infinity is no number
      const T mu = static_cast<T>(momentum_now), fresh = static_cast<T>(1 - dampening),
              step = static_cast<T>(rate);
      for (int64_t at = part.begin; at < part.end; at += kPart) {
        const int64_t n = std::min(kPart, part.end - at);
        T* pp = open_part(p[k], at, n, buffers[0]);
        T* pg = open_gradient(g[k], apart ? from[k] : g[k], factor, at, n, buffers[1]);
        T* pb = has_momentum ? open_part(b[k], at, n, buffers[2]) : nullptr;
        if (grad_scale.defined()) {
          for (int64_t i = 0; i < n; ++i) pg[i] *= unscale;
          close_part(g[k], at, n, pg);
        }
        for (int64_t i = 0; i < n; ++i) {
          T grad = pg[i] * sign + (decays ? decay * pp[i] : T(0));
          if (pb) {
            pb[i] = is_first_step ? grad : mu * pb[i] + fresh * grad;
            grad = nesterov ? grad + mu * pb[i] : pb[i];
          }
          pp[i] -= step * grad;
        }
        close_part(p[k], at, n, pp);
        if (pb) close_part(b[k], at, n, pb);
      }
    });
  });
  for (const DenseList* list : {&p, &g, &b}) list->write_back();
}

void fused_sgd(TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
               double weight_decay, const Tensor& momentum, const Tensor& lr, double dampening,
               bool nesterov, bool maximize, bool is_first_step, const Tensor& grad_scale,
               const Tensor& found_inf) {
  sgd("_fused_sgd_", self, grads, momentum_buffer_list, weight_decay, momentum, lr, dampening,
      nesterov, maximize, is_first_step, grad_scale, found_inf);
}
void scaled_sgd(TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
                TensorSpan sources, const Tensor& lr, const Tensor& factor, double weight_decay,
                const Tensor& momentum, double dampening, bool nesterov, bool maximize,
                bool is_first_step) {
  const double scale = factor.defined() ? number(factor) : 1;
  sgd("_scaled_sgd_", self, grads, momentum_buffer_list, weight_decay, momentum, lr, dampening,
      nesterov, maximize, is_first_step, Tensor(), Tensor(), factor.defined() ? &scale : nullptr,
      sources);
}

/// The norm of all elements of all tensors, a 0-d tensor: no number leaves the device.
void multi_tensor_norm(const Tensor& out, TensorSpan tensors, double order) {
  const DenseList list(tensors, false);
  const std::vector<Part> parts = parts_of(tensors);
  std::vector<double> sums(parts.size(), 0.0);
  const bool infinite = std::isinf(order);
  parallel_chunks(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const Part& part = parts[static_cast<size_t>(index)];
    visit_float(list[part.tensor].dtype(), [&]<class T>() {
      T buffer[kPart];
      double total = 0;
      for (int64_t at = part.begin; at < part.end; at += kPart) {
        const int64_t n = std::min(kPart, part.end - at);
        const T* x = open_part(list[part.tensor], at, n, buffer);
        if (order == 2) {
          total += static_cast<double>(row_dot(x, x, n));
        } else {
          for (int64_t i = 0; i < n; ++i) {
            const double a = std::fabs(static_cast<double>(x[i]));
            if (infinite)
              total = a > total || a != a ? a : total;
            else if (order == 0)
              total += a != 0 ? 1.0 : 0.0;
            else
              total += order == 1 ? a : std::pow(a, order);
          }
        }
      }
      sums[static_cast<size_t>(index)] = total;
    });
  });
  double total = 0;
  for (const double s : sums) {
    if (infinite)
      total = s > total || s != s ? s : total;
    else
      total += s;
  }
  if (!infinite && order != 0) total = order == 2 ? std::sqrt(total) : std::pow(total, 1 / order);
  store_block<double>(static_cast<char*>(out.data()), out.itemsize(), &total, 1, out.dtype());
}

/// The norm, and what gradients of that norm are multiplied by, each step rounded to its dtype.
void clip_coefficient(const Tensor& norm, const Tensor& coefficient, TensorSpan tensors,
                      double order, const Tensor& max_norm, const Tensor& eps, const Tensor& limit,
                      DType) {
  multi_tensor_norm(norm, tensors, order);
  visit_float(norm.dtype(), [&]<class T>() {
    const T divisor = static_cast<T>(number(norm)) + static_cast<T>(number(eps));
    const T quotient = static_cast<T>(number(max_norm)) / divisor,
            most = static_cast<T>(number(limit));
    const double value = static_cast<double>(quotient > most ? most : quotient);
    store_block<double>(static_cast<char*>(coefficient.data()), coefficient.itemsize(), &value, 1,
                        coefficient.dtype());
  });
}

/// Applies f(values, n) to every element of every tensor, in its compute type.
template <class F>
void update_all(TensorSpan tensors, const F& f) {
  const DenseList list(tensors, true);
  const std::vector<Part> parts = parts_of(tensors);
  parallel_chunks(static_cast<int64_t>(parts.size()), [&](int64_t index) {
    const Part& part = parts[static_cast<size_t>(index)];
    visit_float(list[part.tensor].dtype(), [&]<class T>() {
      T buffer[kPart];
      for (int64_t at = part.begin; at < part.end; at += kPart) {
        const int64_t n = std::min(kPart, part.end - at);
        T* x = open_part(list[part.tensor], at, n, buffer);
        f(x, n);
        close_part(list[part.tensor], at, n, x);
      }
    });
  });
  list.write_back();
}

void foreach_mul(TensorSpan self, const Tensor& other) {
  const double factor = number(other);
  update_all(self, [factor](auto* x, int64_t n) {
    const auto f = static_cast<std::remove_pointer_t<decltype(x)>>(factor);
    for (int64_t i = 0; i < n; ++i) x[i] *= f;
  });
}
void foreach_add(TensorSpan self, const Tensor& other, const Scalar& alpha) {
  const double term = number(other) * alpha.to_double();
  update_all(self, [term](auto* x, int64_t n) {
    const auto t = static_cast<std::remove_pointer_t<decltype(x)>>(term);
    for (int64_t i = 0; i < n; ++i) x[i] += t;
  });
}

void convert_all(TensorSpan self, TensorSpan sources) {
  check(self.size() == sources.size(),
        "_convert_all_: lists of tensors must have the same length, ", "got ", self.size(), " and ",
        sources.size());
  for (size_t i = 0; i < self.size(); ++i) {
    check(std::equal(self[i].sizes().begin(), self[i].sizes().end(), sources[i].sizes().begin(),
                     sources[i].sizes().end()),
          "_convert_all_: tensors of one position differ in shape: ", self[i].sizes(), " and ",
          sources[i].sizes());
    if (!is_floating(self[i].dtype()) || !is_floating(sources[i].dtype()))
      fail(ErrorKind::NotImplemented, "\"_convert_all_\" not implemented for '", sources[i].dtype(),
           "' and '", self[i].dtype(), "'");
    kernels_for(DeviceType::CPU)._to_dtype(self[i], sources[i], self[i].dtype());
  }
}

void amp_unscale(TensorSpan self, const Tensor& found_inf, const Tensor& inv_scale) {
  const double factor = number(inv_scale);
  std::atomic<bool> bad{false};
  update_all(self, [&](auto* x, int64_t n) {
    using T = std::remove_pointer_t<decltype(x)>;
    T odd = 0;  // NaN as soon as one element is infinite or NaN
    for (int64_t i = 0; i < n; ++i) odd += x[i] - x[i];
    if (odd != odd) bad.store(true, std::memory_order_relaxed);
    if (factor != 1) {
      for (int64_t i = 0; i < n; ++i) x[i] *= static_cast<T>(factor);
    }
  });
  if (bad.load()) {
    const double one = 1;
    store_block<double>(static_cast<char*>(found_inf.data()), found_inf.itemsize(), &one, 1,
                        found_inf.dtype());
  }
}

void amp_update_scale(const Tensor& self, const Tensor& growth_tracker, const Tensor& found_inf,
                      double growth_factor, double backoff_factor, int64_t growth_interval) {
  double scale = number(self);
  int64_t good = load_scalar(growth_tracker.data(), growth_tracker.dtype()).to_int();
  if (number(found_inf) != 0) {
    scale *= backoff_factor;
    good = 0;
  } else if (++good == growth_interval) {
    const double grown = scale * growth_factor;
    if (std::isfinite(static_cast<float>(grown))) scale = grown;
    good = 0;
  }
  store_block<double>(static_cast<char*>(self.data()), self.itemsize(), &scale, 1, self.dtype());
  const double count = static_cast<double>(good);
  store_block<double>(static_cast<char*>(growth_tracker.data()), growth_tracker.itemsize(), &count,
                      1, growth_tracker.dtype());
}

const RegisterCpu register_optim([](KernelTable& t) {
  t._fused_adam_ = fused_adam;
  t._fused_adamw_ = fused_adamw;
  t._fused_adamw_stochastic_ = fused_adamw_stochastic;
  t._fused_sgd_ = fused_sgd;
  t._scaled_adam_ = scaled_adam;
  t._scaled_sgd_ = scaled_sgd;
  t._multi_tensor_norm = multi_tensor_norm;
  t._clip_coefficient = clip_coefficient;
  t._foreach_mul_ = foreach_mul;
  t._convert_all_ = convert_all;
  t._foreach_add_ = foreach_add;
  t._amp_foreach_non_finite_check_and_unscale_ = amp_unscale;
  t._amp_update_scale_ = amp_update_scale;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
