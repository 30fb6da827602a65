// Errors: one exception type with the Python class it surfaces as. Messages name the op, the
// shapes, dtypes and devices seen, and the way out. Message parts are formatted only on failure.
#pragma once

#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/device.h"
#include "core/dtype.h"

namespace vt {

enum class ErrorKind : uint8_t {
  Runtime,
  Value,
  Index,
  Type,
  NotImplemented,
  OutOfMemory,
  Memory,
  Overflow,
  ZeroDivision,
  Attribute,
};

class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}
  ErrorKind kind() const { return kind_; }
  const std::string& message() const { return message_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
};

inline void append(std::string& out, std::string_view text) { out += text; }
inline void append(std::string& out, const char* text) { out += text; }
inline void append(std::string& out, const std::string& text) { out += text; }
inline void append(std::string& out, char c) { out += c; }
inline void append(std::string& out, bool value) { out += value ? "True" : "False"; }
inline void append(std::string& out, DType dtype) { out += dtype_name(dtype); }
inline void append(std::string& out, Device device) { out += device_name(device); }
/// Shapes print as Python lists: "[2, 3]".
void append(std::string& out, std::span<const int64_t> values);
void append(std::string& out, double value);
template <class T>
  requires(std::is_integral_v<T> && !std::is_same_v<T, bool> && !std::is_same_v<T, char>)
void append(std::string& out, T value) {
  out += std::to_string(value);
}

template <class... Parts>
std::string str(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, str(parts...));
}
template <class First, class... Parts>
  requires(!std::is_same_v<std::decay_t<First>, ErrorKind>)
[[noreturn, gnu::noinline, gnu::cold]] void fail(const First& first, const Parts&... parts) {
  throw Error(ErrorKind::Runtime, str(first, parts...));
}

/// RuntimeError unless `ok`.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(ErrorKind::Runtime, parts...);
}
template <class... Parts>
inline void check_value(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(ErrorKind::Value, parts...);
}
template <class... Parts>
inline void check_index(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(ErrorKind::Index, parts...);
}
template <class... Parts>
inline void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(ErrorKind::Type, parts...);
}

}  // namespace vt
