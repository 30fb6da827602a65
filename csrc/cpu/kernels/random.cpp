// Random numbers. Element i uses Philox counter offset + i, so results depend on neither threads
// nor layout; an op reserves one counter an element.
#include <cmath>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kGrain = 4096;

/// out[i] = f(bits of element i), for every dtype; non-contiguous outputs through a dense copy.
template <class T, class F>
void generate(const Tensor& self, const PhiloxArgs& rng, F&& f) {
  const bool dense = self.is_contiguous();
  const Tensor out = dense ? self : empty(self.sizes(), self.dtype());
  auto* data = static_cast<char*>(out.data());
  const int64_t size = out.itemsize();
  parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    T block[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t m = std::min(kBlock, end - i);
      for (int64_t k = 0; k < m; ++k) block[k] = f(philox(rng.seed, rng.offset + static_cast<uint64_t>(i + k)), i + k);
      store_block<T>(data + i * size, size, block, m, out.dtype());
    }
  });
  if (!dense) kernels_for(DeviceType::CPU).copy_(self, out, false);
}

double unit(const Philox4& p) { return uniform_double(p.value[0], p.value[1]); }
/// (0, 1]: safe under a logarithm.
double unit_open(const Philox4& p) { return 1.0 - unit(p); }

double normal(const Philox4& p) {
  const double radius = std::sqrt(-2.0 * std::log(unit_open(p)));
  return radius * std::cos(6.283185307179586 * uniform_double(p.value[2], p.value[3]));
}

template <class F>
void generate_float(const Tensor& self, const PhiloxArgs& rng, std::string_view op, F&& f) {
  check(is_floating(self.dtype()), op, ": expected a floating-point tensor, got ", self);
  if (self.dtype() == DType::Float64) generate<double>(self, rng, f);
  else generate<float>(self, rng, [&](const Philox4& p, int64_t i) { return static_cast<float>(f(p, i)); });
}

void uniform(const Tensor& self, double from, double to, const PhiloxArgs& rng) {
  check(from <= to, "uniform_ expects to return a [from, to) range, but found from=", from, " > to=", to);
  if (self.dtype() == DType::Float64) {
    generate<double>(self, rng, [=](const Philox4& p, int64_t) { return from + (to - from) * unit(p); });
    return;
  }
  check(is_floating(self.dtype()), "uniform_: expected a floating-point tensor, got ", self);
  // As many bits as the dtype has below 1: rounding up to `to` cannot happen.
  const int bits = self.dtype() == DType::Float32 ? 24 : self.dtype() == DType::Float16 ? 11 : 8;
  const auto low = static_cast<float>(from), range = static_cast<float>(to - from);
  const float step = std::ldexp(1.0f, -bits);
  generate<float>(self, rng, [=](const Philox4& p, int64_t) {
    return low + range * (static_cast<float>(p.value[0] >> (32 - bits)) * step);
  });
}

void randint(const Tensor& self, int64_t low, int64_t high, const PhiloxArgs& rng) {
  check(low < high, "random_ expects 'from' to be less than 'to', but got from=", low, " >= to=", high);
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  // Multiply-high of 64 random bits: a bias below range / 2^64.
  auto draw = [=](const Philox4& p, int64_t) {
    const uint64_t bits = (uint64_t{p.value[0]} << 32) | p.value[1];
    const auto index = static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * range) >> 64);
    return static_cast<int64_t>(static_cast<uint64_t>(low) + index);
  };
  if (is_floating(self.dtype())) generate<double>(self, rng, [&](const Philox4& p, int64_t i) { return static_cast<double>(draw(p, i)); });
  else generate<int64_t>(self, rng, draw);
}

void randperm(const Tensor& self, const PhiloxArgs& rng) {
  std::vector<int64_t> order(static_cast<size_t>(self.numel()));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = self.numel() - 1; i > 0; --i) {
    const Philox4 p = philox(rng.seed, rng.offset + static_cast<uint64_t>(i));
    const uint64_t bits = (uint64_t{p.value[0]} << 32) | p.value[1];
    const auto j = static_cast<int64_t>((static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(i + 1)) >> 64);
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(j)]);
  }
  for (int64_t i = 0; i < self.numel(); i += kBlock) {
    store_block<int64_t>(static_cast<char*>(self.data()) + i * self.itemsize(), self.itemsize(), order.data() + i,
                         std::min(kBlock, self.numel() - i), self.dtype());
  }
}

void bernoulli(const Tensor& self, const Tensor& p, const PhiloxArgs& rng) {
  const Tensor probability = empty(self.sizes(), DType::Float64);
  kernels_for(DeviceType::CPU).copy_(probability, p, false);
  const auto* values = probability.data_as<double>();
  for (int64_t i = 0; i < self.numel(); ++i) {
    check(values[i] >= 0 && values[i] <= 1, "bernoulli_ expects p to be in [0, 1], but got p=", values[i]);
  }
  auto draw = [values](const Philox4& bits, int64_t i) { return unit(bits) < values[i]; };
  if (is_floating(self.dtype())) generate<float>(self, rng, [&](const Philox4& b, int64_t i) { return draw(b, i) ? 1.0f : 0.0f; });
  else generate<uint8_t>(self, rng, [&](const Philox4& b, int64_t i) { return static_cast<uint8_t>(draw(b, i)); });
}

void multinomial(const Tensor& out, const Tensor& self, int64_t samples, bool replacement, const PhiloxArgs& rng) {
  const Tensor weights = empty(self.sizes(), DType::Float64);
  kernels_for(DeviceType::CPU).copy_(weights, self, false);
  const int64_t n = self.size(-1), rows = n == 0 ? 0 : self.numel() / n;
  auto* result = out.data_as<int64_t>();
  std::vector<double> cumulative(static_cast<size_t>(n));
  std::vector<std::pair<double, int64_t>> keys;
  for (int64_t r = 0; r < rows; ++r) {
    const double* w = weights.data_as<double>() + r * n;
    double total = 0;
    int64_t positive = 0;
    for (int64_t i = 0; i < n; ++i) {
      check(w[i] >= 0 && std::isfinite(w[i]), "probability tensor contains either `inf`, `nan` or element < 0");
      total += w[i];
      positive += w[i] > 0;
      cumulative[static_cast<size_t>(i)] = total;
    }
    check(total > 0, "invalid multinomial distribution (sum of probabilities <= 0)");
    const uint64_t base = rng.offset + static_cast<uint64_t>(r * std::max(n, samples));
    if (replacement) {
      for (int64_t s = 0; s < samples; ++s) {
        const double u = unit(philox(rng.seed, base + static_cast<uint64_t>(s))) * total;
        const auto at = std::upper_bound(cumulative.begin(), cumulative.end(), u);
        int64_t index = std::min<int64_t>(at - cumulative.begin(), n - 1);
        while (w[index] == 0) --index;   // only at the very end, by rounding
        result[r * samples + s] = index;
      }
      continue;
    }
    check(positive >= samples, "invalid multinomial distribution (with replacement=False, not enough non-negative category to sample)");
    // Exponential race: the smallest -log(u) / w are a draw without replacement, in order.
    keys.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (w[i] > 0) keys.emplace_back(-std::log(unit_open(philox(rng.seed, base + static_cast<uint64_t>(i)))) / w[i], i);
    }
    std::partial_sort(keys.begin(), keys.begin() + samples, keys.end());
    for (int64_t s = 0; s < samples; ++s) result[r * samples + s] = keys[static_cast<size_t>(s)].second;
  }
}

void dropout(const Tensor& out, const Tensor& mask, const Tensor& input, double p, std::optional<bool> train, const PhiloxArgs& rng) {
  const Tensor dense = input.is_contiguous() ? input : empty(input.sizes(), input.dtype());
  if (!input.is_contiguous()) kernels_for(DeviceType::CPU).copy_(dense, input, false);
  auto* keep = mask.data_as<bool>();
  const bool drops = train.value_or(true);
  // 24 random bits an element, four elements a counter.
  const auto limit = static_cast<uint32_t>(std::ceil(p * 16777216.0));
  parallel_for(0, (input.numel() + 3) / 4, kGrain, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const Philox4 bits = philox(rng.seed, rng.offset + static_cast<uint64_t>(i));
      const int64_t last = std::min<int64_t>(4, input.numel() - i * 4);
      for (int64_t k = 0; k < last; ++k) keep[i * 4 + k] = !drops || (bits.value[k] >> 8) >= limit;
    }
  });
  const double scale = drops && p < 1 ? 1.0 / (1.0 - p) : 1.0;
  kernels_for(DeviceType::CPU)._dropout_backward(out, dense, mask, scale);
}

void apply_mask(const Tensor& out, const Tensor& input, const Tensor& mask, double scale) {
  Tensor target = out;
  TensorIterator it;
  it.binary(target, input, mask, {.promote = Promote::None, .output_dtype = out.dtype(), .op = "dropout"});
  visit_float(out.dtype(), [&]<class T>() {
    const auto s = static_cast<T>(scale);
    map_kernel(it, [s](T x, bool m) -> T { return m ? x * s : T(0); });
  });
}

const RegisterCpu registered([](KernelTable& t) {
  t.uniform_ = uniform;
  t.normal_ = [](const Tensor& self, double mean, double std, const PhiloxArgs& rng) {
    check(std >= 0, "normal_ expects std >= 0.0, but found std=", std);
    generate_float(self, rng, "normal_", [=](const Philox4& p, int64_t) { return mean + std * normal(p); });
  };
  t.exponential_ = [](const Tensor& self, double lambd, const PhiloxArgs& rng) {
    check(lambd > 0, "exponential_ expects lambda > 0.0, but found lambda=", lambd);
    generate_float(self, rng, "exponential_", [=](const Philox4& p, int64_t) { return -std::log(unit_open(p)) / lambd; });
  };
  t._randint_ = randint;
  t._randperm_ = randperm;
  t._bernoulli_tensor_ = bernoulli;
  t._multinomial = multinomial;
  t.native_dropout = dropout;
  t._dropout_backward = apply_mask;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
