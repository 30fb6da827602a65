// The inner loops of CPU kernels. `map_kernel` walks a TensorIterator and applies a scalar
// function; the compiler vectorises the dense case for the ISA this file is compiled for.
// Operands stored as another type than the function's are converted in small blocks on the way,
// so a kernel is written once per compute type: bfloat16 and float16 compute in float.
#pragma once

#include <algorithm>
#include <span>
#include <tuple>
#include <utility>

#include "core/tensor_iterator.h"
#include "dispatch/kernels.h"

namespace vt::cpu::VT_ISA {

/// Elements converted at a time: small enough to stay in L1 for three operands.
inline constexpr int64_t kBlock = 512;

/// Reads `n` strided elements of `from` into dense `T`s. With `round_to` a 16-bit float dtype, the
/// values are first rounded to it (the op's common dtype is that type, its arithmetic float).
template <class T>
void load_block(T* out, const char* data, int64_t stride, int64_t n, DType from, DType round_to);
/// Writes dense `T`s as `n` strided elements of dtype `to`.
template <class T>
void store_block(char* data, int64_t stride, const T* in, int64_t n, DType to);

/// Walks `it` in rows whose operand k holds `types[k]`: dense blocks converted on the way where it
/// is stored as another dtype. Apart from the rows' arithmetic, so that it is compiled once.
void for_each_as(const TensorIterator& it, std::span<const DType> types, TensorIterator::Loop row,
                 int64_t grain);

/// Calls `f.template operator()<T>()` with the compute type of `dtype`: float for 16-bit
/// and 8-bit floats. Ops that do not take 8-bit floats are refused before their kernel.
template <class F>
void visit_all(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Bool:
      return f.template operator()<bool>();
    case DType::UInt8:
      return f.template operator()<uint8_t>();
    case DType::Int8:
      return f.template operator()<int8_t>();
    case DType::Int16:
      return f.template operator()<int16_t>();
    case DType::Int32:
      return f.template operator()<int32_t>();
    case DType::Int64:
      return f.template operator()<int64_t>();
    case DType::Float16:
    case DType::BFloat16:
    case DType::Float32:
    case DType::Float8_e4m3fn:
    case DType::Float8_e5m2:
      return f.template operator()<float>();
    case DType::Float64:
      return f.template operator()<double>();
  }
}
template <class F>
void visit_numeric(DType dtype, F&& f) {
  if (dtype == DType::Bool) fail(ErrorKind::NotImplemented, "not implemented for 'Bool'");
  switch (dtype) {
    case DType::UInt8:
      return f.template operator()<uint8_t>();
    case DType::Int8:
      return f.template operator()<int8_t>();
    case DType::Int16:
      return f.template operator()<int16_t>();
    case DType::Int32:
      return f.template operator()<int32_t>();
    case DType::Int64:
      return f.template operator()<int64_t>();
    case DType::Float64:
      return f.template operator()<double>();
    default:
      return f.template operator()<float>();
  }
}
template <class F>
void visit_integral(DType dtype, F&& f) {
  switch (dtype) {
    case DType::UInt8:
      return f.template operator()<uint8_t>();
    case DType::Int8:
      return f.template operator()<int8_t>();
    case DType::Int16:
      return f.template operator()<int16_t>();
    case DType::Int32:
      return f.template operator()<int32_t>();
    case DType::Int64:
      return f.template operator()<int64_t>();
    default:
      fail(ErrorKind::NotImplemented, "not implemented for '", dtype, "'");
  }
}
template <class F>
void visit_float(DType dtype, F&& f) {
  if (dtype == DType::Float64) return f.template operator()<double>();
  if (is_floating(dtype)) return f.template operator()<float>();
  fail(ErrorKind::NotImplemented, "not implemented for '", dtype, "'");
}

namespace detail {

template <class F>
struct Signature : Signature<decltype(&F::operator())> {};
template <class C, class R, class... A>
struct Signature<R (C::*)(A...) const> {
  using Result = R;
  using Args = std::tuple<std::decay_t<A>...>;
};

/// How operands of type T are read: a bool as its byte, since loops over bool do not vectorise.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, bool>, uint8_t, T>;

template <class R, class... A, class F, size_t... I>
void map_row(char** data, const int64_t* strides, int64_t n, const F& f,
             std::index_sequence<I...>) {
  using Args = std::tuple<A...>;
  constexpr size_t arity = sizeof...(A);
  R* __restrict__ out = reinterpret_cast<R*>(data[0]);
  const std::tuple<const Stored<A>*...> in{reinterpret_cast<const Stored<A>*>(data[I + 1])...};
  const bool dense_out = strides[0] == sizeof(R);
  if (dense_out && ((strides[I + 1] == sizeof(A)) && ...)) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(static_cast<A>(std::get<I>(in)[i])...);
    return;
  }
  if constexpr (arity == 2) {
    using A0 = std::tuple_element_t<0, Args>;
    using A1 = std::tuple_element_t<1, Args>;
    const auto* a = std::get<0>(in);
    const auto* b = std::get<1>(in);
    if (dense_out && strides[1] == sizeof(A0) && strides[2] == 0) {
      const A1 fixed = static_cast<A1>(*b);
      for (int64_t i = 0; i < n; ++i) out[i] = f(static_cast<A0>(a[i]), fixed);
      return;
    }
    if (dense_out && strides[1] == 0 && strides[2] == sizeof(A1)) {
      const A0 fixed = static_cast<A0>(*a);
      for (int64_t i = 0; i < n; ++i) out[i] = f(fixed, static_cast<A1>(b[i]));
      return;
    }
  }
  if constexpr (arity == 3) {
    // Repeated operands (where(c, x, 0), lerp by a number) are spread over a block once, so that
    // the loop stays dense.
    if (dense_out && ((strides[I + 1] == sizeof(A) || strides[I + 1] == 0) && ...)) {
      alignas(64) char spread[arity][kBlock * 8];
      const int64_t block = n < kBlock ? n : kBlock;
      (([&] {
         auto* values = reinterpret_cast<Stored<A>*>(spread[I]);
         if (strides[I + 1] == 0) std::fill_n(values, block, *std::get<I>(in));
       }()),
       ...);
      for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t m = n - i < kBlock ? n - i : kBlock;
        R* __restrict__ target = out + i;
        const std::tuple<const Stored<A>*...> from{
            strides[I + 1] == 0 ? reinterpret_cast<const Stored<A>*>(spread[I])
                                : std::get<I>(in) + i...};
        for (int64_t k = 0; k < m; ++k) target[k] = f(static_cast<A>(std::get<I>(from)[k])...);
      }
      return;
    }
  }
  char* cursor[] = {data[0], data[I + 1]...};
  for (int64_t i = 0; i < n; ++i) {
    *reinterpret_cast<R*>(cursor[0]) = f(*reinterpret_cast<const A*>(cursor[I + 1])...);
    cursor[0] += strides[0];
    ((cursor[I + 1] += strides[I + 1]), ...);
  }
}

/// A dense row, or one with a single repeated operand, is computed in place even when `out`
/// aliases an input (same index, same element); `__restrict__` above states just that.
template <class R, class... A, class F>
void map_typed(const TensorIterator& it, const F& f, int64_t grain) {
  constexpr DType types[] = {DTypeOf<R>::value, DTypeOf<A>::value...};
  for_each_as(
      it, types,
      [&f](char** data, const int64_t* strides, int64_t n) {
        map_row<R, A...>(data, strides, n, f, std::index_sequence_for<A...>());
      },
      grain);
}

template <class R, class Args>
struct MapCaller;
template <class R, class... A>
struct MapCaller<R, std::tuple<A...>> {
  template <class F>
  static void run(const TensorIterator& it, const F& f, int64_t grain) {
    map_typed<R, A...>(it, f, grain);
  }
};

}  // namespace detail

/// out = f(in…) for every element. The types are those of `f`'s parameters and result; operands
/// stored otherwise are converted. `grain`: elements below which one thread does it all.
template <class F>
void map_kernel(const TensorIterator& it, const F& f, int64_t grain = 32768) {
  using S = detail::Signature<F>;
  detail::MapCaller<typename S::Result, typename S::Args>::run(it, f, grain);
}

/// The same by dense blocks: f(out, in…, n) of arrays of T, made of operands of any stride and
/// dtype and written back. For functions of arrays, and those of which one loop is enough code.
template <class T, size_t kInputs, class F>
void map_blocks(const TensorIterator& it, const F& f, int64_t grain = 8192) {
  it.for_each(
      [&](char** data, const int64_t* strides, int64_t n) {
        alignas(64) T out[kBlock], in[kInputs][kBlock];
        for (int64_t i = 0; i < n; i += kBlock) {
          const int64_t m = std::min(kBlock, n - i);
          for (int k = 0; k < static_cast<int>(kInputs); ++k) {
            load_block<T>(in[k], data[k + 1] + i * strides[k + 1], strides[k + 1], m,
                          it.dtype(k + 1), it.compute_dtype(k + 1));
          }
          if constexpr (kInputs == 1)
            f(out, in[0], m);
          else
            f(out, in[0], in[1], m);
          store_block<T>(data[0] + i * strides[0], strides[0], out, m, it.dtype(0));
        }
      },
      grain);
}

}  // namespace vt::cpu::VT_ISA
