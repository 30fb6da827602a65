// What kernels of chains (csrc/cuda/chain_source.cpp) begin with, after activation_math.cuh.
// Compiled at run time by NVRTC, without any header.
//
// A value is held as its dtype's compute type and is always one that the dtype can hold: what an op
// makes is rounded at once, as if it had been stored and loaded.

namespace vt::cuda {

using i64 = long long;
using u32 = unsigned;
using u16 = unsigned short;
using u8 = unsigned char;

// --- dtypes: how they are stored, and how values are rounded to them. N is 1 or 2.

struct Float {
  using Value = float;
  using Stored = float;
  __device__ static float load(Stored x) { return x; }
  __device__ static Stored store(float x) { return x; }
  __device__ static float rounded(float x) { return x; }
  template <int N>
  __device__ static void round(float (&)[N]) {}
};
struct Double {
  using Value = double;
  using Stored = double;
  __device__ static double load(Stored x) { return x; }
  __device__ static Stored store(double x) { return x; }
  __device__ static double rounded(double x) { return x; }
  template <int N>
  __device__ static void round(double (&)[N]) {}
};
struct Bool {
  using Value = bool;
  using Stored = u8;
  __device__ static bool load(Stored x) { return x != 0; }
  __device__ static Stored store(bool x) { return x; }
  __device__ static bool rounded(bool x) { return x; }
  template <int N>
  __device__ static void round(bool (&)[N]) {}
};
struct BFloat16 {
  using Value = float;
  using Stored = u16;
  __device__ static float load(Stored x) { return __uint_as_float(u32{x} << 16); }
  __device__ static Stored store(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
  }
  __device__ static float rounded(float x) { return load(store(x)); }
  __device__ static void round(float (&x)[1]) { x[0] = rounded(x[0]); }
  __device__ static void round(float (&x)[2]) { unpack(pack(x[0], x[1]), x); }
  __device__ static u32 pack(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
  }
  /// Of values that are rounded.
  __device__ static u32 join(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  }
  __device__ static void unpack(u32 bits, float (&x)[2]) {
    x[0] = __uint_as_float(bits << 16);
    x[1] = __uint_as_float(bits & 0xffff0000u);
  }
};
struct Half {
  using Value = float;
  using Stored = u16;
  __device__ static float load(Stored x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
  }
  __device__ static Stored store(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
  }
  __device__ static float rounded(float x) { return load(store(x)); }
  template <int N>
  __device__ static void round(float (&x)[N]) {
    for (int j = 0; j < N; ++j) x[j] = rounded(x[j]);
  }
  __device__ static u32 join(float low, float high) { return store(low) | u32{store(high)} << 16; }
  __device__ static void unpack(u32 bits, float (&x)[2]) {
    x[0] = load(static_cast<u16>(bits));
    x[1] = load(static_cast<u16>(bits >> 16));
  }
};

// --- V elements of a tensor that move as one access

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

template <class S, int V>
struct Piece {
  using Stored = typename S::Stored;
  using Value = typename S::Value;
  Vector<Stored, V> all;

  __device__ void load(const char* p) { all = *reinterpret_cast<const Vector<Stored, V>*>(p); }
  __device__ void store(char* p) const { *reinterpret_cast<Vector<Stored, V>*>(p) = all; }
  __device__ void load(const char* p, u32 count) {
#pragma unroll
    for (u32 k = 0; k < V; ++k)
      all.value[k] = k < count ? reinterpret_cast<const Stored*>(p)[k] : Stored(0);
  }
  __device__ void store(char* p, u32 count) const {
#pragma unroll
    for (u32 k = 0; k < V; ++k) {
      if (k < count) reinterpret_cast<Stored*>(p)[k] = all.value[k];
    }
  }
  template <int N>
  __device__ void get(int at, Value (&x)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = S::load(all.value[at + j]);
  }
  template <int N>
  __device__ void set(int at, const Value (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) all.value[at + j] = S::store(x[j]);
  }
};

/// 16-bit floats in pairs.
template <class S, int V>
struct Pairs {
  Vector<u32, V / 2> all;

  __device__ void load(const char* p) { all = *reinterpret_cast<const Vector<u32, V / 2>*>(p); }
  __device__ void store(char* p) const { *reinterpret_cast<Vector<u32, V / 2>*>(p) = all; }
  __device__ void load(const char* p, u32 count) {
    const auto* from = reinterpret_cast<const u16*>(p);
#pragma unroll
    for (u32 k = 0; k < V / 2; ++k) {
      const u32 low = 2 * k < count ? from[2 * k] : 0, high = 2 * k + 1 < count ? from[2 * k + 1] : 0;
      all.value[k] = low | high << 16;
    }
  }
  __device__ void store(char* p, u32 count) const {
    auto* to = reinterpret_cast<u16*>(p);
#pragma unroll
    for (u32 k = 0; k < V; ++k) {
      if (k < count) to[k] = static_cast<u16>(all.value[k / 2] >> (k % 2 * 16));
    }
  }
  __device__ void get(int at, float (&x)[2]) const { S::unpack(all.value[at / 2], x); }
  __device__ void set(int at, const float (&x)[2]) { all.value[at / 2] = S::join(x[0], x[1]); }
};
template <>
struct Piece<BFloat16, 2> : Pairs<BFloat16, 2> {};
template <>
struct Piece<BFloat16, 4> : Pairs<BFloat16, 4> {};
template <>
struct Piece<BFloat16, 8> : Pairs<BFloat16, 8> {};
template <>
struct Piece<Half, 2> : Pairs<Half, 2> {};
template <>
struct Piece<Half, 4> : Pairs<Half, 4> {};
template <>
struct Piece<Half, 8> : Pairs<Half, 8> {};

template <class S>
__device__ typename S::Value load_one(const char* p) {
  return S::load(*reinterpret_cast<const typename S::Stored*>(p));
}

// --- the ops. C is float, double or, for tests, bool.

/// A result of a function of the compiler's library: what follows is no part of its last step.
__device__ inline float apart(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ inline double apart(double x) {
  asm volatile("" : "+d"(x));
  return x;
}
__device__ inline float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double quotient(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }
template <class C>
__device__ C larger(C a, C b) {
  return a != a ? a : b != b ? b : a > b ? a : b;
}
template <class C>
__device__ C smaller(C a, C b) {
  return a != a ? a : b != b ? b : a < b ? a : b;
}
template <class C>
__device__ C relu(C x) {
  return x != x ? x : x > C(0) ? x : C(0);
}

// --- what a launch is told. The same as ChainArguments in csrc/cuda/chain.h.

struct Divisor {
  u32 divisor, multiplier, shift;
  __device__ u32 divide(u32 n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};
struct Arguments {
  char* data[12];
  double number[32];
  i64 stride[12][6];  // bytes, of the dimensions that count rows; the first moves fastest
  Divisor extent[6];  // of these dimensions
  Divisor pieces;     // of a row
  u32 n;              // elements
};

}  // namespace vt::cuda
