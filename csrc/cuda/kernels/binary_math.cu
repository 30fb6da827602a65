// Functions of two tensors that cost more than an instruction: rounded quotients and their
// remainders, powers, angles.
#include <optional>

#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

// A kernel cannot throw: an integer divided by zero is 0 here, where the CPU raises.
__device__ int64_t quotient(int64_t a, int64_t b) {
  if (b == 0) return 0;
  // The one quotient that overflows wraps.
  return b == -1 ? static_cast<int64_t>(-static_cast<uint64_t>(a)) : a / b;
}
__device__ int64_t rest(int64_t a, int64_t b) { return b == 0 || b == -1 ? 0 : a % b; }

struct DivideTrunc {
  template <class T>
  __device__ T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return quotient(a, b);
    else
      return trunc(a / b);
  }
};

struct FloorDivide {
  __device__ int64_t operator()(int64_t a, int64_t b) const {
    const int64_t mod = rest(a, b);
    return quotient(a, b) - (mod != 0 && (mod < 0) != (b < 0));
  }
  template <class T>
  __device__ T operator()(T a, T b) const {
    const T exact = a / b;
    if (b == T(0)) return exact;
    const T mod = fmod(a, b);
    T whole = (a - mod) / b;
    if (mod != T(0) && (b < T(0)) != (mod < T(0))) whole -= T(1);
    if (whole == T(0)) return copysign(T(0), exact);
    const T down = floor(whole);
    return whole - down > T(0.5) ? down + T(1) : down;
  }
};

struct Remainder {
  __device__ int64_t operator()(int64_t a, int64_t b) const {
    const int64_t mod = rest(a, b);
    return mod != 0 && (mod < 0) != (b < 0) ? mod + b : mod;
  }
  template <class T>
  __device__ T operator()(T a, T b) const {
    const T mod = fmod(a, b);
    return mod != T(0) && (b < T(0)) != (mod < T(0)) ? mod + b : mod;
  }
};

struct Fmod {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return rest(a, b); }
  template <class T>
  __device__ T operator()(T a, T b) const {
    return fmod(a, b);
  }
};

struct Power {
  /// Wraps, as repeated multiplication does. A negative exponent leaves 0 but for bases 1 and -1.
  __device__ int64_t operator()(int64_t base, int64_t exponent) const {
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 == 0 ? 1 : -1) : 0;
    uint64_t result = 1, factor = static_cast<uint64_t>(base);
    for (uint64_t e = static_cast<uint64_t>(exponent); e != 0; e >>= 1) {
      if (e & 1) result *= factor;
      factor *= factor;
    }
    return static_cast<int64_t>(result);
  }
  template <class T>
  __device__ T operator()(T a, T b) const {
    return pow(a, b);
  }
};

/// Powers with a fixed exponent that need no pow.
enum class Exponent : uint8_t { One, Two, Three, Half, MinusOne, MinusTwo, MinusHalf };
struct FixedPower {
  Exponent exponent;
  template <class T>
  __device__ T operator()(T a, T) const {
    switch (exponent) {
      case Exponent::One:
        return a;
      case Exponent::Two:
        return a * a;
      case Exponent::Three:
        return a * a * a;
      case Exponent::Half:
        return sqrt(a);
      case Exponent::MinusHalf:
        return T(1) / sqrt(a);
      case Exponent::MinusOne:
        return T(1) / a;
      case Exponent::MinusTwo:
        return T(1) / (a * a);
    }
    return a;
  }
};

struct Atan2 {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return atan2(a, b);
  }
};
struct Hypot {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return hypot(a, b);
  }
};
struct Copysign {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return copysign(a, b);
  }
};
struct Xlogy {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b != b ? b : a == T(0) ? T(0) : a * log(b);
  }
};

template <class F>
void map_numeric(TensorIterator& it, const F& f) {
  visit_compute_numeric(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, f); });
}
template <class F>
void map_float(TensorIterator& it, const F& f) {
  visit_compute_float(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, f); });
}

std::optional<Exponent> fixed_exponent(double e) {
  return e == 1      ? std::optional(Exponent::One)
         : e == 2    ? std::optional(Exponent::Two)
         : e == 3    ? std::optional(Exponent::Three)
         : e == 0.5  ? std::optional(Exponent::Half)
         : e == -1   ? std::optional(Exponent::MinusOne)
         : e == -2   ? std::optional(Exponent::MinusTwo)
         : e == -0.5 ? std::optional(Exponent::MinusHalf)
                     : std::nullopt;
}

void power(TensorIterator& it) {
  // An exponent in host memory is known now: x ** 2 must not cost a pow.
  std::optional<double> e;
  if (it.on_host(2)) e = load_scalar(it.data(2), it.dtype(2)).to_double();
  if (!is_floating(it.common_dtype())) {
    check(!e || *e >= 0, "Integers to negative integer powers are not allowed.");
    if (it.operand(2).is_number && e)
      check_fits(load_scalar(it.data(2), it.dtype(2)), it.common_dtype());
    map_numeric(it, Power{});
    return;
  }
  const auto fixed = e ? fixed_exponent(*e) : std::nullopt;
  if (fixed)
    map_float(it, FixedPower{*fixed});
  else
    map_float(it, Power{});
}

struct BinaryCrossEntropy {
  FailureSlot* failure;
  template <class T>
  __device__ T operator()(T x, T y) const {
    if (!(x >= T(0) && x <= T(1)))
      stop_kernel(failure, FailedCheck::BinaryCrossEntropy, 0,
                  __double_as_longlong(static_cast<double>(x)));
    if (!(y >= T(0) && y <= T(1)))
      stop_kernel(failure, FailedCheck::BinaryCrossEntropy, 1,
                  __double_as_longlong(static_cast<double>(y)));
    const T yes = max(log(x), T(-100)), no = max(log1p(-x), T(-100));
    return (y - T(1)) * no - y * yes;
  }
};

const RegisterCuda registered([](KernelTable& t) {
  t.floor_divide = [](TensorIterator& it) { map_numeric(it, FloorDivide{}); };
  t._div_trunc = [](TensorIterator& it) { map_numeric(it, DivideTrunc{}); };
  t.remainder = [](TensorIterator& it) { map_numeric(it, Remainder{}); };
  t.fmod = [](TensorIterator& it) { map_numeric(it, Fmod{}); };
  t.pow = power;
  t.atan2 = [](TensorIterator& it) { map_float(it, Atan2{}); };
  t.hypot = [](TensorIterator& it) { map_float(it, Hypot{}); };
  t.copysign = [](TensorIterator& it) { map_float(it, Copysign{}); };
  t._binary_cross_entropy = [](TensorIterator& it) {
    map_float(it, BinaryCrossEntropy{failure_slot(it.device().index)});
  };
  t.xlogy = [](TensorIterator& it) { map_float(it, Xlogy{}); };
});

}  // namespace
}  // namespace vt::cuda
