// Arithmetic of two tensors.
#include <atomic>
#include <cmath>

#include "cpu/kernels/loops.h"
#include "cpu/kernels/vec_math.h"

namespace vt::cpu::VT_ISA {
namespace {

template <class F>
void map_all(TensorIterator& it, const F& f) {
  visit_all(it.common_dtype(), [&]<class T>() {
    map_kernel(it, [f](T a, T b) -> T { return static_cast<T>(f(a, b)); });
  });
}
template <class F>
void map_numeric(TensorIterator& it, const F& f) {
  visit_numeric(it.common_dtype(), [&]<class T>() {
    map_kernel(it, [f](T a, T b) -> T { return static_cast<T>(f(a, b)); });
  });
}
template <class F>
void map_float(TensorIterator& it, const F& f) {
  visit_float(it.common_dtype(),
              [&]<class T>() { map_kernel(it, [f](T a, T b) -> T { return f(a, b); }, 8192); });
}
/// For functions of which one loop is enough code.
template <class F>
void map_long_float(TensorIterator& it, const F& f, int64_t grain = 8192) {
  visit_float(it.common_dtype(), [&]<class T>() {
    map_blocks<T, 2>(
        it,
        [&](T* out, const T* a, const T* b, int64_t n) {
          for (int64_t k = 0; k < n; ++k) out[k] = f(a[k], b[k]);
        },
        grain);
  });
}

void add_scaled(TensorIterator& it, const Scalar& alpha, double sign) {
  const DType dtype = it.common_dtype();
  check(is_floating(dtype) || !alpha.is_float(),
        "For integral input tensors, argument alpha must not be a floating point number.");
  check(dtype == DType::Bool || !alpha.is_bool(),
        "Boolean alpha only supported for Boolean results.");
  visit_all(dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, bool>) {
      const bool scale = alpha.to_bool();
      map_kernel(it, [scale](bool a, bool b) -> bool { return a || (scale && b); });
    } else {
      const T scale = alpha.is_float()
                          ? static_cast<T>(alpha.to_double() * sign)
                          : static_cast<T>(alpha.to_int() * static_cast<int64_t>(sign));
      if (scale == T(1))
        map_kernel(it, [](T a, T b) -> T { return static_cast<T>(a + b); });
      else if (scale == static_cast<T>(-1))
        map_kernel(it, [](T a, T b) -> T { return static_cast<T>(a - b); });
      else
        map_kernel(it, [scale](T a, T b) -> T { return static_cast<T>(a + scale * b); });
    }
  });
}

void check_divisor(TensorIterator& it) {
  // Integer division by zero traps: look before dividing.
  visit_integral(it.common_dtype(), [&]<class T>() {
    it.serial_for_each(
        [&](char** data, const int64_t* strides, int64_t n) {
          alignas(64) T block[kBlock];
          for (int64_t i = 0; i < n; i += kBlock) {
            const int64_t m = std::min(kBlock, n - i);
            load_block<T>(block, data[2] + i * strides[2], strides[2], m, it.dtype(2), it.dtype(2));
            for (int64_t k = 0; k < m; ++k) {
              if (block[k] == T(0)) fail(ErrorKind::Runtime, "ZeroDivisionError");
            }
          }
        },
        0, it.numel());
  });
}

template <class T>
T divide_trunc(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::trunc(a / b);
  else if constexpr (std::is_signed_v<T>)
    return b == T(-1) ? static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a))
                      : static_cast<T>(a / b);
  else
    return static_cast<T>(a / b);
}
/// Quotient and remainder rules, given mod = C's fmod(a, b), without branches.
struct FloorDivide {
  template <class T>
  static T from_mod(T a, T b, T mod) {
    T quotient = (a - mod) / b;
    quotient -= static_cast<T>((mod != T(0)) & ((b < T(0)) != (mod < T(0))));
    const T down = std::floor(quotient);
    const T rounded = down + static_cast<T>(quotient - down > T(0.5));
    const T exact = a / b;
    return b == T(0) ? exact : quotient == T(0) ? std::copysign(T(0), exact) : rounded;
  }
  template <class T>
  static T integer(T a, T b) {
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a));
      const T quotient = static_cast<T>(a / b);
      return static_cast<T>(quotient - ((a % b != 0) && ((a < 0) != (b < 0))));
    }
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T from_mod(T, T b, T mod) {
    return (mod != T(0)) & ((b < T(0)) != (mod < T(0))) ? mod + b : mod;
  }
  template <class T>
  static T integer(T a, T b) {
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return T(0);
      const T mod = static_cast<T>(a % b);
      return static_cast<T>(mod != 0 && (mod < 0) != (b < 0) ? mod + b : mod);
    }
    return static_cast<T>(a % b);
  }
};
struct Fmod {
  template <class T>
  static T from_mod(T, T, T mod) {
    return mod;
  }
  template <class T>
  static T integer(T a, T b) {
    if constexpr (std::is_signed_v<T>) {
      if (b == T(-1)) return T(0);
    }
    return static_cast<T>(a % b);
  }
};

/// fmod of a block. Where every quotient is below 2^24, floats divide in double without error and
/// the loop vectorises; the library's fmod walks over the quotient's bits.
void fmod_block(float* __restrict out, const float* __restrict a, const float* __restrict b,
                int64_t n) {
  int large = 0;
  for (int64_t i = 0; i < n; ++i) large |= !(std::fabs(a[i] / b[i]) < 0x1p23f);
  if (large) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::fmod(a[i], b[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double x = a[i], y = b[i], whole = std::trunc(x / y);
    const float rest = std::copysign(static_cast<float>(x - whole * y), a[i]);
    out[i] = whole == 0.0 ? a[i] : rest;
  }
}
void fmod_block(double* out, const double* a, const double* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::fmod(a[i], b[i]);
}

template <class Rule>
void map_division(TensorIterator& it) {
  const DType dtype = it.common_dtype();
  if (!is_floating(dtype)) {
    check_divisor(it);
    visit_integral(dtype, [&]<class T>() {
      map_kernel(it, [](T a, T b) -> T { return Rule::integer(a, b); });
    });
    return;
  }
  visit_float(dtype, [&]<class T>() {
    map_blocks<T, 2>(it, [](T* out, const T* a, const T* b, int64_t n) {
      fmod_block(out, a, b, n);
      for (int64_t k = 0; k < n; ++k) out[k] = Rule::from_mod(a[k], b[k], out[k]);
    });
  });
}

template <class T>
T integer_power(T base, T exponent) {
  if constexpr (std::is_signed_v<T>) {
    if (exponent < 0) {
      if (base == T(1)) return T(1);
      if (base == T(-1)) return exponent % 2 == 0 ? T(1) : T(-1);
      return T(0);
    }
  }
  using U = std::make_unsigned_t<T>;
  uint64_t result = 1, factor = static_cast<U>(base);
  for (auto e = static_cast<uint64_t>(static_cast<U>(exponent)); e != 0; e >>= 1) {
    if (e & 1) result *= factor;
    factor *= factor;
  }
  return static_cast<T>(result);
}

/// The exponent when it is one number, the usual case: x ** 2 must not cost a pow.
std::optional<double> fixed_exponent(const TensorIterator& it) {
  for (int d = 0; d < it.ndim(); ++d) {
    if (it.stride(2, d) != 0 && it.shape()[d] > 1) return std::nullopt;
  }
  if (it.numel() == 0) return std::nullopt;
  return load_scalar(it.data(2), it.dtype(2)).to_double();
}

void pow(TensorIterator& it) {
  const DType dtype = it.common_dtype();
  if (!is_floating(dtype)) {
    const auto e = fixed_exponent(it);
    check(!it.operand(2).is_number || !e || *e >= 0,
          "Integers to negative integer powers are not allowed.");
    if (it.operand(2).is_number) check_fits(load_scalar(it.data(2), it.dtype(2)), dtype);
    visit_integral(dtype, [&]<class T>() {
      map_kernel(it, [](T a, T b) -> T { return integer_power(a, b); });
    });
    return;
  }
  const auto e = fixed_exponent(it);
  constexpr double kShort[] = {2, 3, 1, 0.5, -1, -2};
  if (!e || std::ranges::find(kShort, *e) == std::end(kShort)) {
    map_long_float(it, [](auto a, auto b) { return vpow(a, b); }, 4096);
    return;
  }
  visit_float(dtype, [&]<class T>() {
    if (e == 2.0)
      map_kernel(it, [](T a, T) -> T { return a * a; });
    else if (e == 3.0)
      map_kernel(it, [](T a, T) -> T { return a * a * a; });
    else if (e == 1.0)
      map_kernel(it, [](T a, T) -> T { return a; });
    else if (e == 0.5)
      map_kernel(it, [](T a, T) -> T { return std::sqrt(a); });
    else if (e == -1.0)
      map_kernel(it, [](T a, T) -> T { return T(1) / a; });
    else
      map_kernel(it, [](T a, T) -> T { return T(1) / (a * a); });
  });
}

/// Throws unless the operand's elements are probabilities.
void check_unit_interval(const TensorIterator& it, int operand, std::string_view name) {
  std::atomic<bool> outside = false;
  visit_float(it.common_dtype(), [&]<class T>() {
    it.for_each([&](char** data, const int64_t* strides, int64_t n) {
      alignas(64) T block[kBlock];
      const int64_t step = strides[operand];
      for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t m = std::min(kBlock, n - i);
        load_block<T>(block, data[operand] + i * step, step, m, it.dtype(operand),
                      it.dtype(operand));
        int bad = 0;
        for (int64_t k = 0; k < m; ++k) bad |= !(block[k] >= 0 && block[k] <= 1);
        if (bad) outside.store(true, std::memory_order_relaxed);
      }
    });
  });
  check(!outside, "binary_cross_entropy: all elements of ", name, " should be between 0 and 1");
}

const RegisterCpu registered([](KernelTable& t) {
  t.add = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, 1); };
  t.sub = [](TensorIterator& it, const Scalar& alpha) { add_scaled(it, alpha, -1); };
  t.mul = [](TensorIterator& it) { map_all(it, [](auto a, auto b) { return a * b; }); };
  t.div = [](TensorIterator& it) { map_float(it, [](auto a, auto b) { return a / b; }); };
  t.floor_divide = [](TensorIterator& it) { map_division<FloorDivide>(it); };
  t._div_trunc = [](TensorIterator& it) {
    if (!is_floating(it.common_dtype())) check_divisor(it);
    map_numeric(it, [](auto a, auto b) { return divide_trunc(a, b); });
  };
  t.remainder = [](TensorIterator& it) { map_division<Remainder>(it); };
  t.fmod = [](TensorIterator& it) { map_division<Fmod>(it); };
  t.pow = pow;
  t.atan2 = [](TensorIterator& it) {
    map_long_float(it, [](auto a, auto b) { return vatan2(a, b); });
  };
  t.hypot = [](TensorIterator& it) {
    map_long_float(it, [](auto a, auto b) { return std::hypot(a, b); });
  };
  t.copysign = [](TensorIterator& it) {
    map_float(it, [](auto a, auto b) { return std::copysign(a, b); });
  };
  t.xlogy = [](TensorIterator& it) {
    map_long_float(it, [](auto a, auto b) {
      return b != b ? b : a == 0 ? decltype(a)(0) : a * vlog(b);
    });
  };
  t._binary_cross_entropy = [](TensorIterator& it) {
    check_unit_interval(it, 1, "input");
    check_unit_interval(it, 2, "target");
    map_long_float(it, [](auto x, auto y) {
      using T = decltype(x);
      const T yes = std::max(vlog(x), T(-100)), no = std::max(vlog1p(-x), T(-100));
      return (y - 1) * no - y * yes;
    });
  };
  t.maximum = [](TensorIterator& it) {
    map_all(it, [](auto a, auto b) { return a != a ? a : b != b ? b : a > b ? a : b; });
  };
  t.minimum = [](TensorIterator& it) {
    map_all(it, [](auto a, auto b) { return a != a ? a : b != b ? b : a < b ? a : b; });
  };
  t.fmax = [](TensorIterator& it) {
    map_all(it, [](auto a, auto b) { return a != a ? b : b != b ? a : a > b ? a : b; });
  };
  t.fmin = [](TensorIterator& it) {
    map_all(it, [](auto a, auto b) { return a != a ? b : b != b ? a : a < b ? a : b; });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
