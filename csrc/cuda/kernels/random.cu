// Random fills. Element i of an op depends on (seed, offset, i) alone and is the number the CPU
// backend draws; a thread takes one counter, that is four 32-bit numbers. A tensor that is not
// dense is drawn row-major and then copied.
#include <cmath>

#include "core/uniform_bounds.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/philox.cuh"

namespace vt::cuda {
namespace {

// The distributions. Each gives the values of one counter: four floats or two doubles.

struct Uniform {
  float low, high, range, step;
  int shift;
  __device__ Vector<float, 4> operator()(const Philox4& bits) const {
    Vector<float, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = low + static_cast<float>(bits.value[i] >> shift) * step * range;
      out.value[i] = x < high ? x : low;
    }
    return out;
  }
};
struct UniformDouble {
  double from, to;
  __device__ Vector<double, 2> operator()(const Philox4& bits) const {
    Vector<double, 2> out;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double x =
          from + half_open_uniform(bits.value[2 * i], bits.value[2 * i + 1]) * (to - from);
      out.value[i] = x < to ? x : from;
    }
    return out;
  }
};

/// Box-Muller: two uniform numbers give two normal ones. Angles are in half turns.
struct Normal {
  float mean, std;
  __device__ Vector<float, 4> operator()(const Philox4& bits) const {
    Vector<float, 4> out;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float radius = sqrtf(-2.0f * logf(open_uniform(bits.value[i]))) * std;
      float sine, cosine;
      sincospif(static_cast<float>(bits.value[i + 1] >> 8) * 0x1p-23f - 1.0f, &sine, &cosine);
      out.value[i] = mean + radius * cosine;
      out.value[i + 1] = mean + radius * sine;
    }
    return out;
  }
};
struct NormalDouble {
  double mean, std;
  __device__ Vector<double, 2> operator()(const Philox4& bits) const {
    const double radius = sqrt(-2 * log(open_uniform(wide(bits.value[0], bits.value[1])))) * std;
    double sine, cosine;
    sincospi(2 * half_open_uniform(bits.value[2], bits.value[3]), &sine, &cosine);
    return {{mean + radius * cosine, mean + radius * sine}};
  }
};

struct Exponential {
  float scale;  // -1 / lambda
  __device__ Vector<float, 4> operator()(const Philox4& bits) const {
    Vector<float, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.value[i] = logf(open_uniform(bits.value[i])) * scale;
    return out;
  }
};
struct ExponentialDouble {
  double lambda;
  __device__ Vector<double, 2> operator()(const Philox4& bits) const {
    Vector<double, 2> out;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out.value[i] = -log(open_uniform(wide(bits.value[2 * i], bits.value[2 * i + 1]))) / lambda;
    return out;
  }
};

/// low + the high half of a 64-bit number times the range; a range of 0 stands for 2^64.
struct Integers {
  int64_t low;
  uint64_t range;
  __device__ Vector<int64_t, 2> operator()(const Philox4& bits) const {
    Vector<int64_t, 2> out;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t number = wide(bits.value[2 * i], bits.value[2 * i + 1]);
      const uint64_t below = range == 0 ? number : __umul64hi(number, range);
      out.value[i] = static_cast<int64_t>(static_cast<uint64_t>(low) + below);
    }
    return out;
  }
};

/// Writes the values of every counter. S is the stored type.
template <class S, class T, int N, class F>
__global__ void __launch_bounds__(kBlock)
    fill_kernel(F draw, PhiloxState rng, S* out, int64_t n, bool vectors) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i * N < n; i += step) {
    const Vector<T, N> drawn = draw(stream(static_cast<uint64_t>(i)));
    Vector<S, N> stored;
#pragma unroll
    for (int k = 0; k < N; ++k) stored.value[k] = convert<S>(drawn.value[k]);
    if (vectors && (i + 1) * N <= n) {
      reinterpret_cast<Vector<S, N>*>(out)[i] = stored;
      continue;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (i * N + k < n) out[i * N + k] = stored.value[k];
    }
  }
}

template <class T, int N, class S, class F>
void fill_as(const Tensor& out, const PhiloxArgs& rng, const F& draw) {
  const Launch launch(out.device());
  const int64_t n = out.numel();
  const bool vectors = reinterpret_cast<uintptr_t>(out.data()) % (sizeof(S) * N) == 0;
  launch(fill_kernel<S, T, N, F>, dim3(launch.fill(ceil_div<int64_t>(n, N * kBlock), kBlock, 8)),
         dim3(kBlock), 0, draw, PhiloxState(rng), out.data_as<S>(), n, vectors);
}

template <class F>
void fill_floats(const Tensor& out, const PhiloxArgs& rng, const F& draw) {
  if (out.dtype() == DType::Float32)
    fill_as<float, 4, float>(out, rng, draw);
  else if (out.dtype() == DType::BFloat16)
    fill_as<float, 4, __nv_bfloat16>(out, rng, draw);
  else
    fill_as<float, 4, __half>(out, rng, draw);
}
template <class F>
void fill_doubles(const Tensor& out, const PhiloxArgs& rng, const F& draw) {
  fill_as<double, 2, double>(out, rng, draw);
}

/// Runs `fill` on `self` where it is dense in order, else on a dense stand-in that is copied back.
template <class F>
void with_dense(const Tensor& self, const F& fill) {
  if (self.numel() == 0) return;
  if (self.is_contiguous()) return fill(self);
  check_no_internal_overlap(self);
  const Tensor dense = vt::empty(self.sizes(), self.dtype(), self.device());
  fill(dense);
  copy(self, dense, true);
}

void require_floating(const Tensor& self, std::string_view op) {
  if (!is_floating(self.dtype()))
    fail(ErrorKind::NotImplemented, op, ": expected a floating tensor, got ", self.dtype());
}

void uniform_(const Tensor& self, double from, double to, const PhiloxArgs& rng) {
  require_floating(self, "uniform_");
  check_uniform_bounds(self.dtype(), from, to);
  with_dense(self, [&](const Tensor& out) {
    if (out.dtype() == DType::Float64) return fill_doubles(out, rng, UniformDouble{from, to});
    // As many random bits as the type has, or rounding would reach `to`.
    const int digits = out.dtype() == DType::Float32 ? 24 : out.dtype() == DType::Float16 ? 11 : 8;
    fill_floats(out, rng,
                Uniform{static_cast<float>(from), static_cast<float>(to),
                        static_cast<float>(to - from), std::ldexp(1.0f, -digits), 32 - digits});
  });
}

void normal_(const Tensor& self, double mean, double std, const PhiloxArgs& rng) {
  require_floating(self, "normal_");
  check(std >= 0, "normal expects std >= 0.0, but found std ", std);
  with_dense(self, [&](const Tensor& out) {
    if (out.dtype() == DType::Float64) return fill_doubles(out, rng, NormalDouble{mean, std});
    fill_floats(out, rng, Normal{static_cast<float>(mean), static_cast<float>(std)});
  });
}

void exponential_(const Tensor& self, double lambda, const PhiloxArgs& rng) {
  require_floating(self, "exponential_");
  check(lambda > 0, "exponential_ expects lambda > 0.0, but found lambda=", lambda);
  with_dense(self, [&](const Tensor& out) {
    if (out.dtype() == DType::Float64) return fill_doubles(out, rng, ExponentialDouble{lambda});
    fill_floats(out, rng, Exponential{static_cast<float>(-1 / lambda)});
  });
}

void randint_(const Tensor& self, int64_t low, int64_t high, const PhiloxArgs& rng) {
  check(low < high, "random_ expects 'from' to be less than 'to', but got from=", low,
        " >= to=", high);
  const Integers draw{low, static_cast<uint64_t>(high) - static_cast<uint64_t>(low)};
  with_dense(self, [&](const Tensor& out) {
    visit_storage(out.dtype(), [&]<class S>() { fill_as<int64_t, 2, S>(out, rng, draw); });
  });
}

/// chance: one probability for all elements (pitch 0), one for each, or null for `fixed`.
__global__ void __launch_bounds__(kBlock)
    bernoulli_kernel(char* out, DType dtype, int64_t itemsize, const char* chance, DType stored,
                     int64_t pitch, double fixed, PhiloxState rng, int64_t n,
                     FailureSlot* failure) {
  const PhiloxStream stream(rng);
  const int64_t step = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; 4 * i < n; i += step) {
    const Philox4 bits = stream(static_cast<uint64_t>(i));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t at = 4 * i + k;
      if (at >= n) break;
      const double p = chance ? load_as<double>(chance + at * pitch, stored) : fixed;
      if (!(p >= 0 && p <= 1))
        stop_kernel(failure, FailedCheck::Bernoulli, at, __double_as_longlong(p));
      store_as<bool>(out + at * itemsize, dtype, static_cast<double>(bits.value[k]) * 0x1p-32 < p);
    }
  }
}

void bernoulli_tensor_(const Tensor& self, const Tensor& p, const PhiloxArgs& rng) {
  double fixed = 0;
  if (p.device().is_cpu()) {
    fixed = p.item().to_double();
    check(fixed >= 0 && fixed <= 1, "Expected p_in >= 0 && p_in <= 1 to be true, but got ", fixed);
  }
  with_dense(self, [&](const Tensor& out) {
    const Launch launch(out.device());
    Tensor chance = p;
    if (p.numel() != 1 && !(p.is_contiguous() && equal(p.sizes(), out.sizes()))) {
      chance = vt::empty(out.sizes(), p.dtype(), out.device());
      copy(chance, p, true);
    }
    const int64_t n = out.numel(), pitch = p.numel() == 1 ? 0 : chance.itemsize();
    launch(bernoulli_kernel, dim3(launch.fill(ceil_div<int64_t>(n, 4 * kBlock), kBlock, 8)),
           dim3(kBlock), 0, out.data_as<char>(), out.dtype(), out.itemsize(),
           p.device().is_cpu() ? nullptr : chance.data_as<char>(), chance.dtype(), pitch, fixed,
           PhiloxState(rng), n, failure_slot(launch.device()));
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.uniform_ = uniform_;
  t.normal_ = normal_;
  t.exponential_ = exponential_;
  t._bernoulli_tensor_ = bernoulli_tensor_;
  t._randint_ = randint_;
});

}  // namespace
}  // namespace vt::cuda
