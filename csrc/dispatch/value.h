// A boxed op argument or result. Only the slow paths box (Python overrides, wrapper layers,
// recording, plugins); the typed path from Python to the kernel never does.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "core/foreign.h"
#include "core/generator.h"
#include "core/tensor.h"

namespace vt {

using Value =
    std::variant<std::monostate, bool, int64_t, double, Scalar, Tensor, std::vector<Tensor>,
                 std::vector<int64_t>, std::vector<double>, std::vector<Scalar>, std::string, DType,
                 Device, MemoryFormat, Generator, PhiloxArgs, Ref<ForeignFunction>>;

// box: from the C++ form that an op's schema type has.
inline Value box(const Tensor& v) { return v.defined() ? Value(v) : Value(); }
inline Value box(TensorSpan v) { return std::vector<Tensor>(v.begin(), v.end()); }
inline Value box(const std::vector<Tensor>& v) { return v; }
inline Value box(IntSpan v) { return std::vector<int64_t>(v.begin(), v.end()); }
inline Value box(std::span<const double> v) { return std::vector<double>(v.begin(), v.end()); }
inline Value box(std::span<const Scalar> v) { return std::vector<Scalar>(v.begin(), v.end()); }
inline Value box(std::string_view v) { return std::string(v); }
inline Value box(bool v) { return v; }
inline Value box(int64_t v) { return v; }
inline Value box(double v) { return v; }
inline Value box(const Scalar& v) { return v; }
inline Value box(DType v) { return v; }
inline Value box(Device v) { return v; }
inline Value box(MemoryFormat v) { return v; }
inline Value box(const Generator& v) { return v ? Value(v) : Value(); }
inline Value box(const PhiloxArgs& v) { return v; }
inline Value box(const Ref<ForeignFunction>& v) { return v; }
template <class T>
Value box(const std::optional<T>& v) {
  return v ? box(*v) : Value();
}

// unbox<T>: back to the C++ form; spans and views point into the Value.
template <class T>
struct Unbox {
  static const T& get(const Value& v) { return std::get<T>(v); }
};
template <class T>
struct Unbox<std::optional<T>> {
  static std::optional<T> get(const Value& v) {
    if (std::holds_alternative<std::monostate>(v)) return std::nullopt;
    return Unbox<T>::get(v);
  }
};
template <>
struct Unbox<Tensor> {
  static Tensor get(const Value& v) {
    return std::holds_alternative<std::monostate>(v) ? Tensor() : std::get<Tensor>(v);
  }
};
template <>
struct Unbox<TensorSpan> {
  static TensorSpan get(const Value& v) { return std::get<std::vector<Tensor>>(v); }
};
template <>
struct Unbox<IntSpan> {
  static IntSpan get(const Value& v) { return std::get<std::vector<int64_t>>(v); }
};
template <>
struct Unbox<std::span<const double>> {
  static std::span<const double> get(const Value& v) { return std::get<std::vector<double>>(v); }
};
template <>
struct Unbox<std::span<const Scalar>> {
  static std::span<const Scalar> get(const Value& v) { return std::get<std::vector<Scalar>>(v); }
};
template <>
struct Unbox<std::string_view> {
  static std::string_view get(const Value& v) { return std::get<std::string>(v); }
};
template <>
struct Unbox<Generator> {
  static Generator get(const Value& v) {
    return std::holds_alternative<std::monostate>(v) ? Generator() : std::get<Generator>(v);
  }
};
template <class T>
decltype(auto) unbox(const Value& v) {
  return Unbox<T>::get(v);
}

}  // namespace vt
