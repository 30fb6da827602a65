// Random fills. Element i of an op depends on (seed, offset, i) alone: threads take fixed groups of
// 64 elements, and a tensor that is not dense is drawn row-major and then copied.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/parallel.h"
#include "core/uniform_bounds.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/vec_math.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int kLanes = 16;           // counters drawn together
constexpr int kGroup = 4 * kLanes;   // 32-bit numbers they give
constexpr int64_t kGroupGrain = 64;  // groups a thread takes at least

#if defined(__AVX512F__)
using Lanes = __m512i;
Lanes spread(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
Lanes load(const uint64_t* x) { return _mm512_loadu_si512(x); }
void store(uint64_t* to, Lanes x) { _mm512_storeu_si512(to, x); }
/// The full product of the low halves.
Lanes multiply(Lanes a, Lanes b) { return _mm512_maskz_mul_epu32(0xff, a, b); }
Lanes high(Lanes a) { return _mm512_maskz_srli_epi64(0xff, a, 32); }
Lanes exclusive_or(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
#elif defined(__AVX2__)
using Lanes = __m256i;
Lanes spread(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
Lanes load(const uint64_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
void store(uint64_t* to, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
Lanes exclusive_or(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
#else
using Lanes = uint64_t;
Lanes spread(uint64_t x) { return x; }
Lanes load(const uint64_t* x) { return *x; }
void store(uint64_t* to, Lanes x) { *to = x; }
Lanes multiply(Lanes a, Lanes b) {
  return uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b);
}
Lanes high(Lanes a) { return a >> 32; }
Lanes exclusive_or(Lanes a, Lanes b) { return a ^ b; }
#endif

/// The numbers of counters first, first + 1, …: number i is lane i % 4 of counter first + i / 4,
/// as philox() gives them. A word of the state is the low half of a 64-bit lane; what a round
/// leaves in the high half is never read.
void draw(uint64_t seed, uint64_t first, uint32_t* out) {
  constexpr int width = sizeof(Lanes) / 8, vectors = kLanes / width;
  uint64_t words[4][kLanes];
  for (uint64_t j = 0; j < kLanes; ++j) words[0][j] = first + j;
  Lanes c0[vectors], c1[vectors], c2[vectors], c3[vectors];
  for (int v = 0; v < vectors; ++v) {
    c0[v] = load(words[0] + v * width);
    c1[v] = high(c0[v]);
    c2[v] = c3[v] = spread(0);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int v = 0; v < vectors; ++v) {
      const Lanes p0 = multiply(spread(0xD2511F53), c0[v]),
                  p1 = multiply(spread(0xCD9E8D57), c2[v]);
      c0[v] = exclusive_or(exclusive_or(high(p1), c1[v]), spread(k0));
      c2[v] = exclusive_or(exclusive_or(high(p0), c3[v]), spread(k1));
      c1[v] = p1;
      c3[v] = p0;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int v = 0; v < vectors; ++v) {
    store(words[0] + v * width, c0[v]);
    store(words[1] + v * width, c1[v]);
    store(words[2] + v * width, c2[v]);
    store(words[3] + v * width, c3[v]);
  }
  for (int j = 0; j < kLanes; ++j) {
    for (int k = 0; k < 4; ++k) out[4 * j + k] = static_cast<uint32_t>(words[k][j]);
  }
}

uint64_t wide(const uint32_t* bits) { return uint64_t{bits[0]} << 32 | bits[1]; }

/// Open (0, 1): no end is hit, so a logarithm of it is finite and not 0.
[[gnu::always_inline]] inline float open_uniform(uint32_t bits) {
  return static_cast<float>(bits >> 9) * 0x1p-23f + 0x1p-24f;
}
double open_uniform(uint64_t bits) { return static_cast<double>(bits >> 12) * 0x1p-52 + 0x1p-53; }

/// Fills dense `self` with fill(bits, values, m): `m` values of T from `numbers` 32-bit numbers
/// each. `T` is converted to self's dtype.
template <class T, int numbers, class F>
void fill_dense(const Tensor& self, const PhiloxArgs& rng, const F& fill) {
  constexpr int64_t per_group = kGroup / numbers;
  const int64_t n = self.numel(), item = self.itemsize();
  char* data = self.data_as<char>();
  const DType dtype = self.dtype();
  parallel_for(0, (n + per_group - 1) / per_group, kGroupGrain, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t bits[kGroup];
    alignas(64) T values[per_group];
    for (int64_t g = begin; g < end; ++g) {
      draw(rng.seed, rng.offset + static_cast<uint64_t>(g * kLanes), bits);
      fill(bits, values);
      const int64_t first = g * per_group;
      store_block<T>(data + first * item, item, values, std::min(per_group, n - first), dtype);
    }
  });
}

/// Runs `fill` on `self` where it is dense in order, else on a dense stand-in that is copied back.
template <class F>
void with_dense(const Tensor& self, const F& fill) {
  if (self.numel() == 0) return;
  if (self.is_contiguous()) return fill(self);
  check_no_internal_overlap(self);
  const Tensor dense = vt::empty(self.sizes(), self.dtype());
  fill(dense);
  kernels_for(DeviceType::CPU).copy_(self, dense, false);
}

void require_floating(const Tensor& self, std::string_view op) {
  if (!is_floating(self.dtype()))
    fail(ErrorKind::NotImplemented, op, ": expected a floating tensor, got ", self.dtype());
}

void uniform_(const Tensor& self, double from, double to, const PhiloxArgs& rng) {
  require_floating(self, "uniform_");
  check_uniform_bounds(self.dtype(), from, to);
  with_dense(self, [&](const Tensor& out) {
    if (out.dtype() == DType::Float64) {
      fill_dense<double, 2>(out, rng, [=](const uint32_t* bits, double* values) {
        for (int i = 0; i < kGroup / 2; ++i) {
          const double x = from + uniform_double(bits[2 * i], bits[2 * i + 1]) * (to - from);
          values[i] = x < to ? x : from;
        }
      });
      return;
    }
    // As many random bits as the type has, or rounding would reach `to`.
    const int digits = out.dtype() == DType::Float32 ? 24 : out.dtype() == DType::Float16 ? 11 : 8;
    const int shift = 32 - digits;
    const float step = std::ldexp(1.0f, -digits), low = static_cast<float>(from),
                high = static_cast<float>(to), range = static_cast<float>(to - from);
    fill_dense<float, 1>(out, rng, [=](const uint32_t* bits, float* values) {
      for (int i = 0; i < kGroup; ++i) {
        const float x =
            low + static_cast<float>(static_cast<int32_t>(bits[i] >> shift)) * step * range;
        values[i] = x < high ? x : low;
      }
    });
  });
}

/// Box-Muller: two uniform numbers give two normal ones.
void normal_(const Tensor& self, double mean, double std, const PhiloxArgs& rng) {
  require_floating(self, "normal_");
  check(std >= 0, "normal expects std >= 0.0, but found std ", std);
  with_dense(self, [&](const Tensor& out) {
    constexpr double two_pi = 6.283185307179586;
    if (out.dtype() == DType::Float64) {
      fill_dense<double, 2>(out, rng, [=](const uint32_t* bits, double* values) {
        for (int i = 0; i < kGroup / 2; i += 2) {
          const double radius = std::sqrt(-2 * std::log(open_uniform(wide(bits + 2 * i)))) * std;
          const double angle = two_pi * uniform_double(bits[2 * i + 2], bits[2 * i + 3]);
          values[i] = mean + radius * std::cos(angle);
          values[i + 1] = mean + radius * std::sin(angle);
        }
      });
      return;
    }
    const float center = static_cast<float>(mean), scale = static_cast<float>(std);
    fill_dense<float, 1>(out, rng, [=](const uint32_t* bits, float* values) {
      for (int i = 0; i < kGroup / 2; ++i) {
        const float u = open_uniform(bits[2 * i]);
        const float angle =
            (static_cast<float>(static_cast<int32_t>(bits[2 * i + 1] >> 8)) * 0x1p-24f - 0.5f) *
            static_cast<float>(two_pi);
        const float radius = std::sqrt(-2.0f * vlog(u)) * scale;
        values[2 * i] = center + radius * vec::cos_in_range(angle);
        values[2 * i + 1] = center + radius * vec::sin_in_range(angle);
      }
    });
  });
}

void exponential_(const Tensor& self, double lambda, const PhiloxArgs& rng) {
  require_floating(self, "exponential_");
  check(lambda > 0, "exponential_ expects lambda > 0.0, but found lambda=", lambda);
  with_dense(self, [&](const Tensor& out) {
    if (out.dtype() == DType::Float64) {
      fill_dense<double, 2>(out, rng, [=](const uint32_t* bits, double* values) {
        for (int i = 0; i < kGroup / 2; ++i)
          values[i] = -std::log(open_uniform(wide(bits + 2 * i))) / lambda;
      });
      return;
    }
    const float scale = static_cast<float>(-1 / lambda);
    fill_dense<float, 1>(out, rng, [=](const uint32_t* bits, float* values) {
      for (int i = 0; i < kGroup; ++i) values[i] = vlog(open_uniform(bits[i])) * scale;
    });
  });
}

void bernoulli_tensor_(const Tensor& self, const Tensor& p, const PhiloxArgs& rng) {
  const Tensor chance = vt::empty(self.sizes(), DType::Float64);
  kernels_for(DeviceType::CPU).copy_(chance, p, false);
  const auto* limit = chance.data_as<double>();
  for (int64_t i = 0; i < chance.numel(); ++i)
    check(limit[i] >= 0 && limit[i] <= 1, "Expected p_in >= 0 && p_in <= 1 to be true, but got ",
          limit[i]);
  with_dense(self, [&](const Tensor& out) {
    const int64_t n = out.numel(), item = out.itemsize();
    parallel_for(0, (n + kGroup - 1) / kGroup, kGroupGrain, [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t bits[kGroup];
      bool values[kGroup];
      for (int64_t g = begin; g < end; ++g) {
        draw(rng.seed, rng.offset + static_cast<uint64_t>(g * kLanes), bits);
        const int64_t first = g * kGroup, m = std::min<int64_t>(kGroup, n - first);
        for (int64_t i = 0; i < m; ++i)
          values[i] = static_cast<double>(bits[i]) * 0x1p-32 < limit[first + i];
        store_block<bool>(out.data_as<char>() + first * item, item, values, m, out.dtype());
      }
    });
  });
}

/// The high half of a 64-bit number times the range: unbiased to range / 2^64.
int64_t below(uint64_t bits, uint64_t range) {
  if (range == 0) return static_cast<int64_t>(bits);  // 2^64 values
  return static_cast<int64_t>(
      static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * range >> 64));
}

void randint_(const Tensor& self, int64_t low, int64_t high, const PhiloxArgs& rng) {
  check(low < high, "random_ expects 'from' to be less than 'to', but got from=", low,
        " >= to=", high);
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  with_dense(self, [&](const Tensor& out) {
    if (range >> 32 == 0) {  // the same product by parts that fit 64 bits, which vectorises
      fill_dense<int64_t, 2>(out, rng, [=](const uint32_t* bits, int64_t* values) {
        for (int i = 0; i < kGroup / 2; ++i) {
          const uint64_t carry = uint64_t{bits[2 * i + 1]} * range >> 32;
          values[i] = low + static_cast<int64_t>((uint64_t{bits[2 * i]} * range + carry) >> 32);
        }
      });
      return;
    }
    fill_dense<int64_t, 2>(out, rng, [=](const uint32_t* bits, int64_t* values) {
      for (int i = 0; i < kGroup / 2; ++i)
        values[i] = static_cast<int64_t>(static_cast<uint64_t>(low) +
                                         static_cast<uint64_t>(below(wide(bits + 2 * i), range)));
    });
  });
}

/// Fisher-Yates; step i uses counter i.
void randperm_(const Tensor& self, const PhiloxArgs& rng) {
  const int64_t n = self.numel();
  const Tensor order = vt::empty(self.sizes(), DType::Int64);
  auto* values = order.data_as<int64_t>();
  std::iota(values, values + n, int64_t{0});
  uint32_t bits[kGroup];
  for (int64_t i = 0; i + 1 < n; ++i) {
    if (i % kLanes == 0) draw(rng.seed, rng.offset + static_cast<uint64_t>(i), bits);
    const uint64_t rest = static_cast<uint64_t>(n - i);
    std::swap(values[i], values[i + below(wide(bits + 4 * (i % kLanes)), rest)]);
  }
  kernels_for(DeviceType::CPU).copy_(self, order, false);
}

/// With replacement each sample is looked up in the cumulative weights; without, each category
/// gets the key Exp(1) / weight and the smallest keys win (an exponential race).
void multinomial(const Tensor& out, const Tensor& self, int64_t num_samples, bool replacement,
                 const PhiloxArgs& rng) {
  const int64_t categories = self.sizes().back();
  const int64_t rows = self.dim() == 1 ? 1 : self.sizes()[0];
  const Tensor weights = vt::empty(self.sizes(), DType::Float64);
  kernels_for(DeviceType::CPU).copy_(weights, self, false);
  auto uniform = [&](int64_t element) {
    const Philox4 v = philox(rng.seed, rng.offset + static_cast<uint64_t>(element));
    return open_uniform(uint64_t{v.value[0]} << 32 | v.value[1]);
  };
  std::vector<double> keys(static_cast<size_t>(categories));
  std::vector<int64_t> order(static_cast<size_t>(categories));
  for (int64_t row = 0; row < rows; ++row) {
    const double* w = weights.data_as<double>() + row * categories;
    int64_t* target = out.data_as<int64_t>() + row * num_samples;
    double total = 0;
    int64_t positive = 0;
    for (int64_t c = 0; c < categories; ++c) {
      check(w[c] >= 0 && std::isfinite(w[c]),
            "probability tensor contains either `inf`, `nan` or element < 0");
      total += w[c];
      positive += w[c] > 0;
      keys[static_cast<size_t>(c)] = total;
    }
    check(total > 0, "invalid multinomial distribution (sum of probabilities <= 0)");
    if (replacement) {
      for (int64_t s = 0; s < num_samples; ++s) {
        const double x = uniform(row * num_samples + s) * total;
        auto at = std::upper_bound(keys.begin(), keys.end(), x) - keys.begin();
        at = std::min<std::ptrdiff_t>(at, categories - 1);
        while (w[at] == 0) --at;
        target[s] = at;
      }
      continue;
    }
    check(positive >= num_samples,
          "invalid multinomial distribution (with replacement=False, not enough non-negative "
          "category to sample)");
    for (int64_t c = 0; c < categories; ++c) {
      const auto i = static_cast<size_t>(c);
      keys[i] = w[c] > 0 ? -std::log(uniform(row * categories + c)) / w[c]
                         : std::numeric_limits<double>::infinity();
      order[i] = c;
    }
    std::partial_sort(order.begin(), order.begin() + num_samples, order.end(),
                      [&](int64_t a, int64_t b) {
                        return keys[static_cast<size_t>(a)] < keys[static_cast<size_t>(b)];
                      });
    std::copy_n(order.begin(), num_samples, target);
  }
}

/// Elements are numbered as they lie in `output`, which is dense.
void native_dropout(const Tensor& output, const Tensor& mask, const Tensor& input, double p,
                    std::optional<bool> train, const PhiloxArgs& rng) {
  const int64_t n = output.numel(), item = output.itemsize();
  if (n == 0) return;
  auto* kept = mask.data_as<bool>();
  if (!train.value_or(true)) {
    kernels_for(DeviceType::CPU).copy_(output, input, false);
    std::fill_n(kept, n, true);
    return;
  }
  Tensor source = input;
  if (!equal(input.strides(), output.strides())) {
    source = output;
    kernels_for(DeviceType::CPU).copy_(output, input, false);
  }
  const char* in = source.data_as<char>();
  char* out = output.data_as<char>();
  const auto limit = static_cast<uint64_t>(p * 0x1p32);
  auto run = [&]<class T>() {
    const T scale = p < 1 ? static_cast<T>(1 / (1 - p)) : T(0);
    parallel_for(0, (n + kGroup - 1) / kGroup, kGroupGrain, [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t bits[kGroup];
      alignas(64) T values[kGroup];
      for (int64_t g = begin; g < end; ++g) {
        draw(rng.seed, rng.offset + static_cast<uint64_t>(g * kLanes), bits);
        const int64_t first = g * kGroup, m = std::min<int64_t>(kGroup, n - first);
        load_block<T>(values, in + first * item, item, m, input.dtype(), input.dtype());
        for (int64_t i = 0; i < m; ++i) {
          const bool keep = bits[i] >= limit;
          kept[first + i] = keep;
          values[i] = keep ? values[i] * scale : T(0);
        }
        store_block<T>(out + first * item, item, values, m, output.dtype());
      }
    });
  };
  visit_float(input.dtype(), run);
}

void dropout_backward(const Tensor& out, const Tensor& grad, const Tensor& mask, double scale) {
  Tensor target = out;
  TensorIterator it;
  it.binary(target, grad, mask,
            {.promote = Promote::None, .op = "_dropout_backward", .check_overlap = false});
  dropout_backward_rows(it, scale);
}

const RegisterCpu registered([](KernelTable& t) {
  t.uniform_ = uniform_;
  t.normal_ = normal_;
  t.exponential_ = exponential_;
  t._bernoulli_tensor_ = bernoulli_tensor_;
  t._randint_ = randint_;
  t._randperm_ = randperm_;
  t._multinomial = multinomial;
  t.native_dropout = native_dropout;
  t._dropout_backward = dropout_backward;
});

}  // namespace

void dropout_backward_rows(const TensorIterator& it, double scale) {
  visit_float(it.dtype(1), [&]<class T>() {
    const T factor = static_cast<T>(scale);
    map_kernel(it, [factor](T g, bool keep) -> T { return keep ? g * factor : T(0); });
  });
}

}  // namespace vt::cpu::VT_ISA
