// Elementwise math: error in units of the last place against the C library's double functions over
// a sample of all floats, special values by name, and 16-bit conversions over all patterns.
// With the argument --report: the largest error of each function and where.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/vec_math.h"

#include "check.h"

namespace {

using namespace vt::cpu::VT_ISA;
using vt::test::failures;

bool report = false;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float of_bits(uint32_t x) { return std::bit_cast<float>(x); }

/// |got - want| in units of float's last place at `want`. Infinity counts as 2^128, so that a
/// result may round either way at the border; zero has the sign of the reference.
double error_in_ulp(float got, double want) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got) ? 0 : 1e9;
  if (want == 0 && (got != 0 || std::signbit(got) != std::signbit(want))) return 1e9;
  const double border = 0x1p128;
  const double w = std::clamp(want, -border, border);
  const double g = std::isinf(got) ? std::copysign(border, got) : static_cast<double>(got);
  const int exponent = std::max(w == 0 ? -1000 : std::ilogb(w), -126);
  return std::fabs(g - w) / std::ldexp(1.0, std::min(exponent, 127) - 23);
}

/// A function over an array, so that the vectorised code is what runs.
using Unary = void (*)(float*, const float*, int64_t);
using Binary = void (*)(float*, const float*, const float*, int64_t);

template <auto F>
[[gnu::noinline]] void each(float* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = F(in[i]);
}
template <auto F>
[[gnu::noinline]] void each2(float* __restrict out, const float* __restrict a,
                             const float* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = F(a[i], b[i]);
}

double reference_sigmoid(double x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}
double reference_softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

struct Case {
  const char* name;
  Unary f;
  double (*reference)(double);
  double ulps;
  double absolute;  // allowed besides; for functions of cancelling terms
};

const Case kCases[] = {
    {"exp", each<static_cast<float (*)(float)>(vexp)>, std::exp, 2, 0},
    {"exp2", each<static_cast<float (*)(float)>(vexp2)>, std::exp2, 2, 0},
    {"expm1", each<static_cast<float (*)(float)>(vexpm1)>, std::expm1, 1, 0},
    {"log", each<static_cast<float (*)(float)>(vlog)>, std::log, 2, 0},
    {"log2", each<static_cast<float (*)(float)>(vlog2)>, std::log2, 1, 0},
    {"log10", each<static_cast<float (*)(float)>(vlog10)>, std::log10, 1, 0},
    {"log1p", each<static_cast<float (*)(float)>(vlog1p)>, std::log1p, 2, 0},
    {"tanh", each<static_cast<float (*)(float)>(vtanh)>, std::tanh, 2, 0},
    {"sinh", each<static_cast<float (*)(float)>(vsinh)>, std::sinh, 1, 0},
    {"cosh", each<static_cast<float (*)(float)>(vcosh)>, std::cosh, 1, 0},
    {"asinh", each<static_cast<float (*)(float)>(vasinh)>, std::asinh, 1, 0},
    {"acosh", each<static_cast<float (*)(float)>(vacosh)>, std::acosh, 1, 0},
    {"atanh", each<static_cast<float (*)(float)>(vatanh)>, std::atanh, 1, 0},
    {"erf", each<static_cast<float (*)(float)>(verf)>, std::erf, 2, 0},
    {"erfc", each<static_cast<float (*)(float)>(verfc)>, std::erfc, 1, 0},
    {"sin", vsin_n, std::sin, 2, 0},
    {"cos", vcos_n, std::cos, 2, 0},
    {"tan", vtan_n, std::tan, 4, 0},
    {"sin (scalar)", each<static_cast<float (*)(float)>(vsin)>, std::sin, 2, 0},
    {"cos (scalar)", each<static_cast<float (*)(float)>(vcos)>, std::cos, 2, 0},
    {"tan (scalar)", each<static_cast<float (*)(float)>(vtan)>, std::tan, 4, 0},
    {"asin", each<static_cast<float (*)(float)>(vasin)>, std::asin, 3, 0},
    {"acos", each<static_cast<float (*)(float)>(vacos)>, std::acos, 3, 0},
    {"atan", each<static_cast<float (*)(float)>(vatan)>, std::atan, 3, 0},
    {"sigmoid", each<vsigmoid<float>>, reference_sigmoid, 3, 0},
    {"softplus", each<[](float x) { return vsoftplus(x); }>, reference_softplus, 3, 0},
    {"silu", each<vsilu<float>>, [](double x) { return x * reference_sigmoid(x); }, 4, 1e-36},
    {"silu_grad", each<vsilu_grad<float>>,
     [](double x) {
       const double s = reference_sigmoid(x);
       return s * (1 + x * (1 - s));
     },
     4, 1e-6},
    {"mish", each<vmish<float>>, [](double x) { return x * std::tanh(std::log1p(std::exp(x))); }, 4,
     1e-36},
    {"gelu", each<vgelu<float>>, vgelu<double>, 4, 2e-7},
    {"gelu_grad", each<vgelu_grad<float>>, vgelu_grad<double>, 4, 2e-7},
    {"gelu_tanh", each<vgelu_tanh<float>>, vgelu_tanh<double>, 4, 1e-6},
    {"gelu_tanh_grad", each<vgelu_tanh_grad<float>>, vgelu_tanh_grad<double>, 4, 1e-6},
};

/// Every `stride`-th float, both signs, NaNs among them.
template <class F>
void for_sampled_blocks(uint64_t stride, const F& f) {
  std::vector<float> in;
  in.reserve(4096);
  for (uint64_t b = 0; b < uint64_t{1} << 32; b += stride) {
    in.push_back(of_bits(static_cast<uint32_t>(b)));
    if (in.size() == in.capacity()) {
      f(in);
      in.clear();
    }
  }
  f(in);
}

void unary_functions_are_accurate() {
  std::vector<float> out(4096);
  for (const Case& c : kCases) {
    double worst = 0;
    float where = 0;
    int bad = 0;
    const auto check = [&](const std::vector<float>& in) {
      c.f(out.data(), in.data(), static_cast<int64_t>(in.size()));
      for (size_t i = 0; i < in.size(); ++i) {
        const double want = c.reference(in[i]);
        const double error = error_in_ulp(out[i], want);
        const bool close = std::fabs(static_cast<double>(out[i]) - want) <= c.absolute;
        if (error > worst && !close) {
          worst = error;
          where = in[i];
        }
        bad += error > c.ulps && !close;
      }
    };
    for_sampled_blocks(8191, check);
    std::vector<float> dense;  // where the functions bend
    for (int i = -4096 * 12; i <= 4096 * 12; ++i)
      dense.push_back(static_cast<float>(i) / 4096.0f + 1e-5f);
    for (size_t i = 0; i < dense.size(); i += 4096) {
      check({dense.begin() + i, dense.begin() + std::min(i + 4096, dense.size())});
    }
    if (report) std::printf("%-16s %.3f ulp at %.9g\n", c.name, worst, where);
    if (bad != 0) {
      ++failures;
      std::printf("%s: %d values beyond %.1f ulp; worst %.3f at %.9g\n", c.name, bad, c.ulps, worst,
                  where);
    }
  }
}

void binary_functions_are_accurate() {
  struct Case2 {
    const char* name;
    Binary f;
    double (*reference)(double, double);
    double ulps;
  };
  const Case2 cases[] = {
      {"pow", each2<static_cast<float (*)(float, float)>(vpow)>, std::pow, 1},
      {"atan2", each2<static_cast<float (*)(float, float)>(vatan2)>, std::atan2, 4},
  };
  const std::vector<float> special{
      0.0f,        -0.0f,        1.0f,        -1.0f,        2.0f,        -2.0f,       3.0f,
      -3.0f,       0.5f,         -0.5f,       2.5f,         -2.5f,       1e-40f,      -1e-40f,
      16777215.0f, -16777215.0f, 16777216.0f, -16777216.0f, 8388607.5f,  3e38f,       -3e38f,
      kInf,        -kInf,        kNaN,        1.0000001f,   0.99999994f, -1.0000001f, 1e-30f};
  for (const Case2& c : cases) {
    double worst = 0;
    float at[2] = {};
    const auto check = [&](const std::vector<float>& x, const std::vector<float>& y) {
      std::vector<float> out(x.size());
      c.f(out.data(), x.data(), y.data(), static_cast<int64_t>(x.size()));
      for (size_t i = 0; i < x.size(); ++i) {
        const double error = error_in_ulp(out[i], c.reference(x[i], y[i]));
        if (error > worst) {
          worst = error;
          at[0] = x[i];
          at[1] = y[i];
        }
      }
    };
    std::vector<float> x, y;
    for (float a : special) {
      for (float b : special) {
        x.push_back(a);
        y.push_back(b);
      }
    }
    check(x, y);
    uint32_t state = 1;  // xorshift: any bit patterns, then values where results are finite
    const auto next = [&] {
      state ^= state << 13;
      state ^= state >> 17;
      return state ^= state << 5;
    };
    for (int block = 0; block < 128; ++block) {
      x.resize(4096);
      y.resize(4096);
      for (int i = 0; i < 4096; ++i) {
        const bool any = block % 2 == 0;
        x[i] = any ? of_bits(next()) : static_cast<float>(next()) * 0x1p-30f;
        y[i] = any ? of_bits(next()) : static_cast<float>(static_cast<int32_t>(next())) * 0x1p-26f;
      }
      check(x, y);
    }
    if (report) std::printf("%-16s %.3f ulp at %.9g, %.9g\n", c.name, worst, at[0], at[1]);
    if (worst > c.ulps) {
      ++failures;
      std::printf("%s: %.3f ulp at %.9g, %.9g\n", c.name, worst, at[0], at[1]);
    }
  }
}

void exact_where_one_expects_it() {
  for (int n = -149; n <= 127; ++n) {
    const float p = std::ldexp(1.0f, n);
    CHECK(vexp2(static_cast<float>(n)) == p);
    CHECK(vlog2(p) == static_cast<float>(n));
    CHECK(vpow(2.0f, static_cast<float>(n)) == p);
  }
  float power = 1;
  for (int n = 0; n <= 10; ++n, power *= 10) {
    CHECK(vlog10(power) == static_cast<float>(n));
    CHECK(vpow(10.0f, static_cast<float>(n)) == power);
  }
  CHECK(vexp(0.0f) == 1 && vlog(1.0f) == 0 && !std::signbit(vlog(1.0f)));
  CHECK(vcos(0.0f) == 1 && vsigmoid(0.0f) == 0.5f && vtanh(20.0f) == 1 && verf(-6.0f) == -1);
  CHECK(vexp(kInf) == kInf && vexp(-kInf) == 0 && std::isnan(vexp(kNaN)));
  CHECK(vlog(0.0f) == -kInf && vlog(-0.0f) == -kInf && vlog(kInf) == kInf &&
        std::isnan(vlog(-1.0f)));
  CHECK(std::isnan(vsin(kInf)) && std::isnan(vcos(-kInf)) && std::isnan(vtan(kNaN)));
  CHECK(vsigmoid(-kInf) == 0 && vsigmoid(kInf) == 1 && vsoftplus(30.0f) == 30.0f);
  CHECK(vsoftplus(0.5f, 2.0f, 0.5f) == 0.5f);
  CHECK(std::fabs(vsoftplus(0.25f, 2.0f, 20.0f) - std::log1p(std::exp(0.5)) / 2) < 1e-7);
  CHECK(std::isnan(vgelu(kNaN)) && vgelu(kInf) == kInf && vgelu(-1e30f) == 0 &&
        vgelu(1e30f) == 1e30f);
}

void trig_arrays_may_be_in_place() {
  std::vector<float> in(1000), out(1000);
  for (int i = 0; i < 1000; ++i) in[i] = static_cast<float>(i * i) * (i > 700 ? 1e3f : 0.01f);
  vcos_n(out.data(), in.data(), 1000);
  std::vector<float> both = in;
  vcos_n(both.data(), both.data(), 1000);
  CHECK(both == out);
}

void conversions_are_exact() {
  std::vector<uint16_t> all(1 << 16), back(1 << 16);
  std::vector<float> wide(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const auto n = static_cast<int64_t>(all.size());

  f32_from_bf16(wide.data(), all.data(), n);
  bf16_from_f32(back.data(), wide.data(), n);
  int bad = 0;
  for (int i = 0; i < n; ++i) {
    const bool nan = std::isnan(wide[i]);
    bad += nan ? back[i] != (i | 0x40) : back[i] != i;
    bad += std::bit_cast<uint32_t>(wide[i]) != static_cast<uint32_t>(i) << 16;
  }
  CHECK(bad == 0);

  f32_from_f16(wide.data(), all.data(), n);
  f16_from_f32(back.data(), wide.data(), n);
  for (int i = 0; i < n; ++i) {
    const int exponent = (i >> 10) & 31;
    const int fraction = i & 1023;
    double want =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) want = fraction ? kNaN : kInf;
    if (i & 0x8000) want = -want;
    const bool nan = std::isnan(want);
    bad += nan ? !std::isnan(wide[i]) || back[i] != (i | 0x200) : wide[i] != want || back[i] != i;
    bad += std::bit_cast<uint32_t>(wide[i]) != std::bit_cast<uint32_t>(f32_of_f16(all[i]));
  }
  CHECK(bad == 0);

  // To 16 bits: no other value is nearer, and a tie goes to the even one.
  std::vector<uint16_t> half(4096), brain(4096);
  for_sampled_blocks(4093, [&](const std::vector<float>& in) {
    const auto count = static_cast<int64_t>(in.size());
    f16_from_f32(half.data(), in.data(), count);
    bf16_from_f32(brain.data(), in.data(), count);
    for (size_t i = 0; i < in.size(); ++i) {
      bad += half[i] != f16_of_f32(in[i]) || brain[i] != bf16_of_f32(in[i]);
      if (std::isnan(in[i])) {
        bad += !std::isnan(f32_of_f16(half[i])) || !std::isnan(f32_of_bf16(brain[i]));
        continue;
      }
      const auto nearest = [&](uint16_t got, float (*widen)(uint16_t), double past_largest) {
        const auto value = [&](uint16_t x) {
          const double v = widen(x);
          return std::isinf(v) ? std::copysign(past_largest, v) : v;
        };
        const double error = std::fabs(value(got) - in[i]);
        const uint16_t magnitude = got & 0x7fff;
        const uint16_t sign = got & 0x8000;
        const double x = std::clamp(static_cast<double>(in[i]), -past_largest, past_largest);
        if (std::fabs(x) == past_largest) return std::isinf(widen(got));
        for (int step : {-1, 1}) {
          const int other = magnitude + step;
          if (other < 0 || std::isnan(widen(static_cast<uint16_t>(other)))) continue;
          const double d = std::fabs(value(static_cast<uint16_t>(sign | other)) - x);
          if (d < error || (d == error && (got & 1))) return false;
        }
        return std::signbit(widen(got)) == std::signbit(in[i]);
      };
      bad += !nearest(half[i], f32_of_f16, 65536.0);
      bad += !nearest(brain[i], f32_of_bf16, 0x1p128);
    }
  });
  CHECK(bad == 0);
  const float ties[] = {65519.996f,      65520.0f, 65504.0f, 0x1p-25f,
                        0x1.000002p-25f, 2049.0f,  2051.0f};
  const uint16_t expected[] = {0x7bff, 0x7c00, 0x7bff, 0, 1, 0x6800, 0x6802};
  for (int i = 0; i < 7; ++i) CHECK(f16_of_f32(ties[i]) == expected[i]);
}

}  // namespace

int main(int argc, char** argv) {
  report = argc > 1 && std::strcmp(argv[1], "--report") == 0;
  unary_functions_are_accurate();
  binary_functions_are_accurate();
  exact_where_one_expects_it();
  trig_arrays_may_be_in_place();
  conversions_are_exact();
  if (failures == 0) std::puts("test_kernel_vec_math: ok");
  return failures != 0;
}
