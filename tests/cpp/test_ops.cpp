// Ops, views and autograd from C++, so that the sanitizers see the kernels, the index spaces and
// the engine: strided operands beside plain loops, gradients beside differences, small training
// steps.
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

#include "autograd/engine.h"
#include "autograd/front.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/tensor.h"
#include "cpu/backend.h"
#include "dispatch/thread_state.h"
#include "vt/ops.h"

#include "check.h"

namespace {

using namespace vt;
using vt::test::failures;

const Device kCpu{DeviceType::CPU, 0};

Tensor randn(std::vector<int64_t> shape, DType dtype = DType::Float32) {
  return ops::randn(IntSpan(shape.data(), shape.size()), default_generator(kCpu), dtype, kCpu);
}

/// The elements in row-major order, each read by its own chain of views.
std::vector<double> elements(const Tensor& t) {
  if (t.dim() == 0) return {t.item().to_double()};
  std::vector<double> all;
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (const double x : elements(ops::select(t, 0, i))) all.push_back(x);
  }
  return all;
}

bool close(const std::vector<double>& got, const std::vector<double>& wanted, double bound) {
  if (got.size() != wanted.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - wanted[i]) <= bound * (1 + std::abs(wanted[i])))) return false;
  }
  return true;
}

/// Tensors of one shape in every kind of layout.
std::vector<Tensor> layouts(int64_t rows, int64_t columns, DType dtype) {
  const int64_t wide[] = {rows, columns};
  return {
      randn({rows, columns}, dtype),
      ops::transpose(randn({columns, rows}, dtype), 0, 1),
      ops::slice(randn({rows, 2 * columns + 1}, dtype), 1, 1, 2 * columns + 1, 2),
      ops::slice(randn({rows + 3, columns}, dtype), 0, 3, rows + 3, 1),
      ops::expand(randn({rows, 1}, dtype), wide, false),
      ops::expand(randn({columns}, dtype), wide, false),
      ops::expand(randn({}, dtype), wide, false),
  };
}

void strided_operands() {
  struct Size {
    int64_t rows, columns;
  };
  for (const DType dtype : {DType::Float32, DType::Float64, DType::BFloat16}) {
    const double bound = dtype == DType::Float64 ? 1e-15 : dtype == DType::Float32 ? 1e-6 : 8e-3;
    for (const auto [rows, columns] : {Size{5, 37}, Size{3, 1}, Size{1, 64}, Size{0, 4}}) {
      for (const Tensor& a : layouts(rows, columns, dtype)) {
        const std::vector<double> x = elements(a);
        for (const Tensor& b : layouts(rows, columns, DType::Float32)) {
          const std::vector<double> y = elements(b);
          const Tensor sum = ops::add(a, b, 2), chosen = ops::where(ops::lt(a, b), a, b);
          std::vector<double> wanted(x.size()), smaller(x.size());
          for (size_t i = 0; i < x.size(); ++i) {
            wanted[i] = x[i] + 2 * y[i];
            smaller[i] = std::min(x[i], y[i]);
          }
          CHECK(close(elements(sum), wanted, 1e-6) && close(elements(chosen), smaller, 1e-6));
        }
        std::vector<double> columns_of(columns), rows_of(rows);
        for (int64_t i = 0; i < rows * columns; ++i) {
          columns_of[i % columns] += x[i];
          rows_of[i / columns] += x[i];
        }
        const int64_t first[] = {0}, second[] = {1};
        CHECK(close(elements(ops::sum_dim(a, IntSpan(first), false, {})), columns_of, 4 * bound));
        CHECK(close(elements(ops::sum_dim(a, IntSpan(second), false, {})), rows_of, 12 * bound));
        const auto [sorted, order] = ops::sort(a, 1, false, true);
        CHECK(elements(ops::gather(a, 1, order, false)) == elements(sorted));
        const Tensor halves[] = {ops::slice(a, 1, 0, columns / 2, 1),
                                 ops::slice(a, 1, columns / 2, columns, 1)};
        CHECK(elements(ops::cat(halves, 1)) == x);
        CHECK(elements(ops::flip(ops::flip(a, first), first)) == x);
      }
    }
  }
}

void changes_in_place() {
  const Tensor base = randn({6, 8});
  const std::vector<double> before = elements(base);
  const Tensor odd = ops::slice(ops::transpose(base, 0, 1), 0, 1, 8, 2);
  ops::add_(odd, ops::full({}, 1.0, DType::Float32, kCpu), 1);
  std::vector<double> wanted = before;
  for (size_t i = 1; i < wanted.size(); i += 2) wanted[i] += 1;
  CHECK(close(elements(base), wanted, 1e-6));
  const int64_t shape[] = {6, 8};
  bool refused = false;
  try {
    ops::add_(ops::expand(randn({6, 1}), shape, false), base, 1);
  } catch (const Error&) {
    refused = true;
  }
  CHECK(refused);
}

Tensor parameter(std::vector<int64_t> shape, double scale, DType dtype = DType::Float32) {
  const Tensor t = randn(std::move(shape), dtype);
  ops::mul_(t, ops::full({}, scale, dtype, kCpu));
  t.impl()->requires_grad = true;
  return t;
}

void backward(const Tensor& loss) { autograd::backward({&loss, 1}, {}, {}, {}); }

/// The loss of a transformer layer over 2 sequences of 5 tokens of 11 kinds.
struct Layer {
  explicit Layer(DType dtype)
      : table(parameter({11, 8}, 1, dtype)),
        gain(parameter({8}, 1, dtype)),
        shift(parameter({8}, 0.1, dtype)),
        qkv(parameter({24, 8}, 0.4, dtype)),
        bias(parameter({24}, 0.1, dtype)),
        head(parameter({11, 8}, 0.4, dtype)) {}

  std::vector<Tensor> parameters() const { return {table, gain, shift, qkv, bias, head}; }

  Tensor loss(const Tensor& tokens) const {
    const int64_t width[] = {8}, heads[] = {2, 5, 2, 4}, joined[] = {2, 5, 8}, flat[] = {10, 11},
                  ten[] = {10};
    const Tensor x = ops::embedding(table, tokens, -1, false, false);
    const Tensor h = ops::linear(ops::layer_norm(x, width, gain, shift, 1e-5, true), qkv, bias);
    Tensor parts[3];
    for (int i = 0; i < 3; ++i) {
      parts[i] = ops::transpose(
          ops::view(ops::contiguous(ops::slice(h, 2, 8 * i, 8 * i + 8, 1), {}), heads), 1, 2);
    }
    const Tensor mixed = ops::scaled_dot_product_attention(parts[0], parts[1], parts[2], Tensor(),
                                                           0, true, {}, false);
    const Tensor y = ops::add(x, ops::reshape(ops::transpose(mixed, 1, 2), joined), 1);
    const Tensor logits = ops::view(ops::linear(ops::gelu(y, "tanh"), head, Tensor()), flat);
    return ops::nll_loss(ops::log_softmax(logits, 1, {}), ops::reshape(tokens, ten), Tensor(), 1,
                         -100);
  }

  Tensor table, gain, shift, qkv, bias, head;
};

/// The loss of a convolution in two groups with pooling.
struct Picture {
  explicit Picture(DType dtype)
      : filters(parameter({6, 2, 3, 3}, 0.3, dtype)),
        bias(parameter({6}, 0.1, dtype)),
        head(parameter({3, 54}, 0.2, dtype)) {}

  std::vector<Tensor> parameters() const { return {filters, bias, head}; }

  Tensor loss(const Tensor& pixels) const {
    const int64_t one[] = {1, 1}, two[] = {2, 2}, none[] = {0, 0}, flat[] = {2, 54};
    const Tensor h = ops::conv2d(pixels, filters, bias, one, one, one, 2);
    const Tensor pooled = ops::max_pool2d(ops::relu(h), two, two, none, one, false);
    const Tensor y = ops::linear(ops::reshape(pooled, flat), head, Tensor());
    return ops::mean(ops::mul(y, y), {});
  }

  Tensor filters, bias, head;
};

/// Every gradient's largest element beside a central difference, in float64.
template <class Model>
void gradients_are_differences(const Model& model, const Tensor& input) {
  backward(model.loss(input));
  for (const Tensor& p : model.parameters()) {
    const Tensor gradient = p.impl()->autograd->grad;
    const std::vector<double> slopes = elements(gradient);
    size_t largest = 0;
    for (size_t i = 0; i < slopes.size(); ++i) {
      if (std::abs(slopes[i]) > std::abs(slopes[largest])) largest = i;
    }
    double& x = p.data_as<double>()[largest];
    const double start = x, step = 1e-6;
    double sides[2];
    for (int side = 0; side < 2; ++side) {
      x = start + (side == 0 ? step : -step);
      sides[side] = model.loss(input).item().to_double();
    }
    x = start;
    CHECK(std::abs((sides[0] - sides[1]) / (2 * step) - slopes[largest]) < 1e-6);
  }
}

template <class Model>
void training_lowers_the_loss(const Model& model, const Tensor& input, double rate) {
  const double first = model.loss(input).item().to_double();
  for (int step = 0; step < 20; ++step) {
    backward(model.loss(input));
    thread_state.grad_enabled = false;
    for (const Tensor& p : model.parameters()) {
      ops::sub_(p, p.impl()->autograd->grad, rate);
      p.impl()->autograd->grad.reset();
    }
    thread_state.grad_enabled = true;
  }
  CHECK(model.loss(input).item().to_double() < 0.9 * first);
}

void models() {
  const int64_t batch[] = {2, 5};
  const Tensor tokens = ops::zeros(batch, DType::Int64, kCpu);
  for (int i = 0; i < 10; ++i) tokens.data_as<int64_t>()[i] = i * i % 11;
  gradients_are_differences(Layer(DType::Float64), tokens);
  training_lowers_the_loss(Layer(DType::Float32), tokens, 0.1);
  gradients_are_differences(Picture(DType::Float64), randn({2, 4, 6, 6}, DType::Float64));
  training_lowers_the_loss(Picture(DType::Float32), randn({2, 4, 6, 6}), 0.01);
}

void errors_leave_nothing() {
  const int64_t before = TensorImpl::live_count();
  const std::function<void()> wrong[] = {
      [] { ops::add(randn({2, 3}), randn({2, 4}), 1); },
      [] { ops::linear(randn({2, 3}), parameter({4, 5}, 1), Tensor()); },
      [] { ops::gather(randn({2, 3}), 1, ops::full({}, 7, DType::Int64, kCpu), false); },
      [] { backward(randn({2})); },
  };
  for (const auto& call : wrong) {
    bool failed = false;
    try {
      call();
    } catch (const Error&) {
      failed = true;
    }
    CHECK(failed);
  }
  CHECK(TensorImpl::live_count() == before);
}

}  // namespace

int main() {
  cpu::load_backend();
  strided_operands();
  changes_in_place();
  models();
  errors_leave_nothing();
  if (failures == 0) std::printf("test_ops: ok\n");
  return failures != 0;
}
