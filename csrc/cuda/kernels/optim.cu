// Fused optimizer steps and the multi-tensor ops around them. Each tensor keeps its own dtype;
// arithmetic is in float, or double where the parameter is double. Learning rate, momentum (Adam's
// beta1), step counts, gradient scale and found_inf are read by the kernels where they are on the
// device: no number comes back to the host.
#include "core/random_rounding.h"
#include "core/tensor_lists.h"
#include "cuda/kernels/multi_tensor.cuh"
#include "cuda/kernels/philox.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

/// Lists: parameter, gradient, first moment, second moment, its largest value (amsgrad), and what
/// the gradient is read from where that is another tensor.
struct Adam {
  static constexpr unsigned kNarrow = 0b100000;
  unsigned reads, writes;
  Number lr, beta1_now, grad_scale, found_inf;
  Number factor{1.0}, count;  // what gradients are multiplied by, and steps go on by, first
  double beta2, weight_decay, eps;
  bool amsgrad, maximize, decoupled, apart;

  template <class T>
  struct State {
    T scale, step_size, inverse_root, sign, unscale, coupling, factor, beta2, keep1, keep2, eps;
  };
  __device__ bool skip() const { return found_inf.get() != 0; }
  template <class T>
  __device__ State<T> prepare(const Number& step_number) const {
    const double step = step_number.get() + count.get(), rate = lr.get(), beta1 = beta1_now.get();
    State<T> s;
    s.scale = static_cast<T>(factor.get());
    const T bias1 = static_cast<T>(1 - pow(beta1, step));
    s.step_size = static_cast<T>(rate) / bias1;
    s.inverse_root = T(1) / static_cast<T>(sqrt(1 - pow(beta2, step)));
    s.unscale = static_cast<T>(1 / grad_scale.get());
    s.sign = (maximize ? T(-1) : T(1)) * s.unscale;
    s.coupling = decoupled ? T(0) : static_cast<T>(weight_decay);
    s.factor = decoupled ? static_cast<T>(1 - rate * weight_decay) : T(1);
    s.beta2 = static_cast<T>(beta2);
    s.keep1 = static_cast<T>(1 - beta1);
    s.keep2 = static_cast<T>(1 - beta2);
    s.eps = static_cast<T>(eps);
    return s;
  }
  template <class T>
  __device__ void operator()(const State<T>& s, T (&x)[6]) const {
    T &p = x[0], &g = x[1], &m = x[2], &v = x[3], &top = x[4];
    g = (apart ? x[5] : g) * s.scale;
    // 0 times infinity is no number.
    const T grad = g * s.sign + (s.coupling != T(0) ? s.coupling * p : T(0));
    m += (grad - m) * s.keep1;
    v = v * s.beta2 + s.keep2 * grad * grad;
    if (amsgrad) top = top > v ? top : v;
    p = p * s.factor - s.step_size * m / (root(amsgrad ? top : v) * s.inverse_root + s.eps);
    g *= s.unscale;
  }
};

void adam(std::string_view op, TensorSpan self, TensorSpan grads, TensorSpan exp_avgs,
          TensorSpan exp_avg_sqs, TensorSpan max_exp_avg_sqs, TensorSpan state_steps, Adam f,
          const Tensor& lr, const Tensor& grad_scale, const Tensor& found_inf,
          bool scaled = false, TensorSpan sources = {}) {
  check_lists(op, self.size(),
              {grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, sources});
  if (self.empty()) return;
  check(!grads.empty() && !exp_avgs.empty() && !exp_avg_sqs.empty() && !state_steps.empty() &&
            (!f.amsgrad || !max_exp_avg_sqs.empty()),
        op, ": gradients, moments and step counts are needed for all ", self.size(),
        " parameters, and max_exp_avg_sqs with amsgrad");
  f.lr = Number(lr);
  f.grad_scale = Number(grad_scale, 1);
  f.found_inf = Number(found_inf);
  f.apart = !sources.empty();
  f.reads = (f.amsgrad ? 0b11101 : 0b01101) | (f.apart ? 0b100000 : 0b000010);
  f.writes =
      (f.amsgrad ? 0b11101 : 0b01101) | (grad_scale.defined() || scaled || f.apart ? 0b00010 : 0);
  std::vector<Number> steps;
  for (const Tensor& t : state_steps) steps.emplace_back(t);
  const Launch launch(self[0].device());
  const DenseLists<6> lists({self, grads, exp_avgs, exp_avg_sqs,
                             f.amsgrad ? max_exp_avg_sqs : TensorSpan(), sources},
                            f.writes);
  multi_tensor_apply(launch, lists, &steps, f);
  lists.write_back();
}

Adam adam_settings(const Tensor& beta1, double beta2, double weight_decay, double eps, bool amsgrad,
                   bool maximize, bool decoupled) {
  Adam f{};
  f.beta1_now = Number(beta1);
  f.beta2 = beta2;
  f.weight_decay = weight_decay;
  f.eps = eps;
  f.amsgrad = amsgrad;
  f.maximize = maximize;
  f.decoupled = decoupled;
  return f;
}

void fused_adam(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                TensorSpan max_exp_avg_sqs, TensorSpan state_steps, const Tensor& lr,
                const Tensor& beta1, double beta2, double weight_decay, double eps, bool amsgrad,
                bool maximize, const Tensor& grad_scale, const Tensor& found_inf) {
  adam("_fused_adam_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
       adam_settings(beta1, beta2, weight_decay, eps, amsgrad, maximize, false), lr, grad_scale,
       found_inf);
}
void fused_adamw(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                 TensorSpan max_exp_avg_sqs, TensorSpan state_steps, const Tensor& lr,
                 const Tensor& beta1, double beta2, double weight_decay, double eps, bool amsgrad,
                 bool maximize, const Tensor& grad_scale, const Tensor& found_inf) {
  adam("_fused_adamw_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps,
       adam_settings(beta1, beta2, weight_decay, eps, amsgrad, maximize, true), lr, grad_scale,
       found_inf);
}

/// A float as bfloat16, up or down at random; inf and NaN as they are.
__device__ inline __nv_bfloat16 rounded_at_random(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  if (is_not_finite(bits)) return __float2bfloat16(x);
  return __ushort_as_bfloat16(round_at_random(bits, random));
}

/// Adam's update of the bfloat16 elements at, at + 1, … of a tensor: W of them from an even one on,
/// which the counters from `counter` on round. `data`: of the table's lists.
template <int W>
__device__ inline void adam_at_random(const Adam& f, const Adam::State<float>& s,
                                      char* const (&data)[5], int64_t at,
                                      const PhiloxStream& draw, uint64_t counter) {
  float values[5][W];
#pragma unroll
  for (int l = 0; l < 5; ++l) {
    if (f.reads >> l & 1)
      load_piece(reinterpret_cast<const __nv_bfloat16*>(data[l]) + at, values[l]);
  }
  Vector<__nv_bfloat16, W> stored[5];
  Philox4 drawn;
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float one[6] = {values[0][w], values[1][w], values[2][w], values[3][w], values[4][w], 0};
    f(s, one);
    if (w % 2 == 0) drawn = draw(counter + static_cast<uint64_t>(w / 2));
    const RoundingBits bits = rounding_bits(drawn, w);
    stored[0].value[w] = rounded_at_random(one[0], bits.word[0]);
    stored[1].value[w] = __float2bfloat16(one[1]);
    stored[2].value[w] = rounded_at_random(one[2], bits.word[0] >> 16);
    stored[3].value[w] = rounded_at_random(one[3], bits.word[1]);
    stored[4].value[w] = rounded_at_random(one[4], bits.word[1] >> 16);
  }
#pragma unroll
  for (int l = 0; l < 5; ++l) {
    if (f.writes >> l & 1)
      *reinterpret_cast<Vector<__nv_bfloat16, W>*>(reinterpret_cast<__nv_bfloat16*>(data[l]) + at) =
          stored[l];
  }
}

/// A block updates one chunk of a tensor; chunks of all tables are counted on from first_chunk.
__global__ void __launch_bounds__(kMultiThreads)
    adam_at_random_kernel(const __grid_constant__ TensorTable<5> table, const Adam f,
                          const PhiloxState random, int64_t first_chunk) {
  static_assert(kChunkElements == kRoundedChunk);
  __shared__ Adam::State<float> shared;
  if (f.skip()) return;
  const int k = table.find(static_cast<int>(blockIdx.x));
  if (threadIdx.x == 0) shared = f.prepare<float>(table.number[k]);
  __syncthreads();
  const Adam::State<float> s = shared;
  const int64_t begin = (blockIdx.x - table.first_block[k]) * kChunkElements;
  const int64_t n =
      table.numel[k] - begin < kChunkElements ? table.numel[k] - begin : kChunkElements;
  char* data[5];
#pragma unroll
  for (int l = 0; l < 5; ++l) data[l] = table.data[l][k];
  const PhiloxStream draw(random);
  const uint64_t counters =
      static_cast<uint64_t>(first_chunk + blockIdx.x) * (kChunkElements / 2);
  constexpr int W = kWidthOf<__nv_bfloat16>;
  const int64_t body = table.aligned[k] ? n / W * W : 0;
  for (int64_t i = threadIdx.x * W; i < body; i += kMultiThreads * W)
    adam_at_random<W>(f, s, data, begin + i, draw, counters + static_cast<uint64_t>(i / 2));
  // One thread takes two elements, which share a counter; the last one may be alone.
  for (int64_t i = body + 2 * threadIdx.x; i < n; i += 2 * kMultiThreads) {
    const uint64_t counter = counters + static_cast<uint64_t>(i / 2);
    for (int64_t j = i; j < n && j < i + 2; ++j) {
      float one[6] = {};
#pragma unroll
      for (int l = 0; l < 5; ++l) {
        if (f.reads >> l & 1)
          one[l] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data[l])[begin + j]);
      }
      f(s, one);
      const RoundingBits bits = rounding_bits(draw(counter), j - i);
      const __nv_bfloat16 stored[5] = {rounded_at_random(one[0], bits.word[0]),
                                       __float2bfloat16(one[1]),
                                       rounded_at_random(one[2], bits.word[0] >> 16),
                                       rounded_at_random(one[3], bits.word[1]),
                                       rounded_at_random(one[4], bits.word[1] >> 16)};
#pragma unroll
      for (int l = 0; l < 5; ++l) {
        if (f.writes >> l & 1)
          reinterpret_cast<__nv_bfloat16*>(data[l])[begin + j] = stored[l];
      }
    }
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
  if (self.empty()) return;
  check(!grads.empty() && !exp_avgs.empty() && !exp_avg_sqs.empty() && !state_steps.empty() &&
            (!amsgrad || !max_exp_avg_sqs.empty()),
        op, ": gradients, moments and step counts are needed for all ", self.size(),
        " parameters, and max_exp_avg_sqs with amsgrad");
  Adam f = adam_settings(beta1, beta2, weight_decay, eps, amsgrad, maximize, true);
  f.lr = Number(lr);
  f.grad_scale = Number(grad_scale, 1);
  f.found_inf = Number(found_inf);
  f.apart = false;
  f.reads = amsgrad ? 0b11111 : 0b01111;
  f.writes = (amsgrad ? 0b11101 : 0b01101) | (grad_scale.defined() ? 0b00010 : 0);
  std::vector<Number> steps;
  for (const Tensor& t : state_steps) steps.emplace_back(t);
  const Launch launch(self[0].device());
  const DenseLists<5> lists(
      {self, grads, exp_avgs, exp_avg_sqs, amsgrad ? max_exp_avg_sqs : TensorSpan()}, f.writes);
  int64_t first_chunk = 0;
  for_each_table(lists, &steps, 0, [&](Stored, const TensorTable<5>& table, int32_t blocks) {
    launch(adam_at_random_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMultiThreads), 0,
           table, f, PhiloxState(rng), first_chunk);
    first_chunk += blocks;
  });
  lists.write_back();
}

/// Lists: parameter, gradient, momentum, and what the gradient is read from if that is another tensor.
struct Sgd {
  static constexpr unsigned kNarrow = 0b1000;
  unsigned reads, writes;
  Number lr, momentum, grad_scale, found_inf;
  Number factor{1.0};  // what gradients are multiplied by first
  double weight_decay, dampening;
  bool has_momentum, nesterov, maximize, first, apart;

  template <class T>
  struct State {
    T rate, scale, unscale, sign, decay, momentum, fresh;
  };
  __device__ bool skip() const { return found_inf.get() != 0; }
  template <class T>
  __device__ State<T> prepare(const Number&) const {
    return {static_cast<T>(lr.get()),
            static_cast<T>(factor.get()),
            static_cast<T>(1 / grad_scale.get()),
            maximize ? T(-1) : T(1),
            static_cast<T>(weight_decay),
            static_cast<T>(momentum.get()),
            static_cast<T>(1 - dampening)};
  }
  template <class T>
  __device__ void operator()(const State<T>& s, T (&x)[4]) const {
    T &p = x[0], &g = x[1], &b = x[2];
    g = (apart ? x[3] : g) * s.scale;
    g *= s.unscale;
    T grad = g * s.sign + (s.decay != T(0) ? s.decay * p : T(0));
    if (has_momentum) {
      b = first ? grad : s.momentum * b + s.fresh * grad;
      grad = nesterov ? grad + s.momentum * b : b;
    }
    p -= s.rate * grad;
  }
};

/// factor: undefined, or what gradients are multiplied by first.
void sgd(std::string_view op, TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
         double weight_decay, const Tensor& momentum, const Tensor& lr, double dampening,
         bool nesterov, bool maximize, bool is_first_step, const Tensor& grad_scale,
         const Tensor& found_inf, const Tensor& factor, TensorSpan sources) {
  check_lists(op, self.size(), {grads, momentum_buffer_list, sources});
  if (self.empty()) return;
  check(!grads.empty(), op, ": gradients are needed for all ", self.size(), " parameters");
  Sgd f{};
  f.has_momentum = !momentum_buffer_list.empty();
  f.apart = !sources.empty();
  // A first step fills the momentum: what it held may be anything, so it is not read.
  f.reads = (f.has_momentum && !is_first_step ? 0b101 : 0b001) | (f.apart ? 0b1000 : 0b0010);
  f.writes = (f.has_momentum ? 0b101 : 0b001) |
             (grad_scale.defined() || factor.defined() || f.apart ? 0b010 : 0);
  f.lr = Number(lr);
  f.factor = Number(factor, 1);
  f.grad_scale = Number(grad_scale, 1);
  f.found_inf = Number(found_inf);
  f.weight_decay = weight_decay;
  f.momentum = Number(momentum);
  f.dampening = dampening;
  f.nesterov = nesterov;
  f.maximize = maximize;
  f.first = is_first_step;
  const Launch launch(self[0].device());
  const DenseLists<4> lists(
      {self, grads, f.has_momentum ? momentum_buffer_list : TensorSpan(), sources}, f.writes);
  multi_tensor_apply(launch, lists, nullptr, f);
  lists.write_back();
}

void fused_sgd(TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
               double weight_decay, const Tensor& momentum, const Tensor& lr, double dampening,
               bool nesterov, bool maximize, bool is_first_step, const Tensor& grad_scale,
               const Tensor& found_inf) {
  sgd("_fused_sgd_", self, grads, momentum_buffer_list, weight_decay, momentum, lr, dampening,
      nesterov, maximize, is_first_step, grad_scale, found_inf, Tensor(), {});
}
void scaled_sgd(TensorSpan self, TensorSpan grads, TensorSpan momentum_buffer_list,
                TensorSpan sources, const Tensor& lr, const Tensor& factor, double weight_decay,
                const Tensor& momentum, double dampening, bool nesterov, bool maximize,
                bool is_first_step) {
  sgd("_scaled_sgd_", self, grads, momentum_buffer_list, weight_decay, momentum, lr, dampening,
      nesterov, maximize, is_first_step, Tensor(), Tensor(), factor, sources);
}

void check_floating(std::string_view op, TensorSpan tensors) {
  for (const Tensor& t : tensors) {
    if (!is_floating(t.dtype()))
      fail(ErrorKind::NotImplemented, "\"", op, "\" not implemented for '", t.dtype(), "'");
  }
}

/// x = x * factor + term, the numbers rounded to the compute type.
struct Update {
  static constexpr unsigned kNarrow = 0;
  unsigned reads = 1, writes = 1;
  Number number;
  double alpha = 1;
  bool multiply;

  template <class T>
  struct State {
    T value;
  };
  __device__ bool skip() const { return false; }
  template <class T>
  __device__ State<T> prepare(const Number&) const {
    return {static_cast<T>(number.get() * alpha)};
  }
  template <class T>
  __device__ void operator()(const State<T>& s, T (&x)[1]) const {
    x[0] = multiply ? x[0] * s.value : x[0] + s.value;
  }
};

void update_all(std::string_view op, TensorSpan self, const Tensor& other, double alpha,
                bool multiply) {
  check_floating(op, self);
  if (self.empty()) return;
  Update f;
  f.number = Number(other);
  f.alpha = alpha;
  f.multiply = multiply;
  const Launch launch(self[0].device());
  const DenseLists<1> lists({self}, 1);
  multi_tensor_apply(launch, lists, nullptr, f);
  lists.write_back();
}

/// All blocks read the steps as they were, so these go on in a launch of their own, after the update.
void scaled_adam(TensorSpan self, TensorSpan grads, TensorSpan exp_avgs, TensorSpan exp_avg_sqs,
                 TensorSpan max_exp_avg_sqs, TensorSpan state_steps, TensorSpan sources,
                 const Tensor& lr, const Tensor& factor, const Tensor& count, const Tensor& beta1,
                 double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                 bool decoupled) {
  Adam f = adam_settings(beta1, beta2, weight_decay, eps, amsgrad, maximize, decoupled);
  f.factor = Number(factor, 1);
  f.count = Number(count);
  adam("_scaled_adam_", self, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, f, lr,
       Tensor(), Tensor(), factor.defined(), sources);
  if (!count.defined()) return;
  std::vector<Tensor> on_device, on_host;
  for (const Tensor& step : state_steps)
    (step.device().is_cuda() ? on_device : on_host).push_back(step);
  update_all("_scaled_adam_", on_device, count, 1, false);
  if (!on_host.empty()) kernels_for(DeviceType::CPU)._foreach_add_(on_host, count, Scalar(1));
}

/// x *= factor; found_inf = 1 if one x is not finite. Every thread that writes, writes the same.
struct Unscale {
  static constexpr unsigned kNarrow = 0;
  unsigned reads = 1, writes = 1;
  Number factor;
  char* found_inf;
  DType found_dtype;

  template <class T>
  struct State {
    T factor;
  };
  __device__ bool skip() const { return false; }
  template <class T>
  __device__ State<T> prepare(const Number&) const {
    return {static_cast<T>(factor.get())};
  }
  template <class T>
  __device__ void operator()(const State<T>& s, T (&x)[1]) const {
    if (!isfinite(x[0])) store_as(found_inf, found_dtype, 1.0);
    if (s.factor != T(1)) x[0] *= s.factor;
  }
};

void amp_unscale(TensorSpan self, const Tensor& found_inf, const Tensor& inv_scale) {
  check_floating("_amp_foreach_non_finite_check_and_unscale_", self);
  if (self.empty()) return;
  Unscale f;
  f.factor = Number(inv_scale);
  f.found_inf = static_cast<char*>(found_inf.data());
  f.found_dtype = found_inf.dtype();
  const Launch launch(self[0].device());
  const DenseLists<1> lists({self}, 1);
  multi_tensor_apply(launch, lists, nullptr, f);
  lists.write_back();
}

__global__ void update_scale(char* scale, DType scale_dtype, char* tracker, DType tracker_dtype,
                             Number found_inf, double growth_factor, double backoff_factor,
                             int64_t growth_interval) {
  double value = load_as<double>(scale, scale_dtype);
  int64_t good = load_as<int64_t>(tracker, tracker_dtype);
  if (found_inf.get() != 0) {
    value *= backoff_factor;
    good = 0;
  } else if (++good == growth_interval) {
    const double grown = value * growth_factor;
    if (isfinite(static_cast<float>(grown))) value = grown;
    good = 0;
  }
  store_as(scale, scale_dtype, value);
  store_as(tracker, tracker_dtype, good);
}

void amp_update_scale(const Tensor& self, const Tensor& growth_tracker, const Tensor& found_inf,
                      double growth_factor, double backoff_factor, int64_t growth_interval) {
  const Launch launch(self.device());
  launch(update_scale, dim3(1), dim3(1), 0, static_cast<char*>(self.data()), self.dtype(),
         static_cast<char*>(growth_tracker.data()), growth_tracker.dtype(), Number(found_inf),
         growth_factor, backoff_factor, growth_interval);
}

const RegisterCuda registered([](KernelTable& t) {
  t._fused_adam_ = fused_adam;
  t._fused_adamw_ = fused_adamw;
  t._fused_adamw_stochastic_ = fused_adamw_stochastic;
  t._fused_sgd_ = fused_sgd;
  t._scaled_adam_ = scaled_adam;
  t._scaled_sgd_ = scaled_sgd;
  t._foreach_mul_ = [](TensorSpan self, const Tensor& other) {
    update_all("_foreach_mul_", self, other, 1, true);
  };
  t._foreach_add_ = [](TensorSpan self, const Tensor& other, const Scalar& alpha) {
    update_all("_foreach_add_", self, other, alpha.to_double(), false);
  };
  t._amp_foreach_non_finite_check_and_unscale_ = amp_unscale;
  t._amp_update_scale_ = amp_update_scale;
});

}  // namespace
}  // namespace vt::cuda
