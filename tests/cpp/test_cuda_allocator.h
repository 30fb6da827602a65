// What the allocator tests share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "core/error.h"
#include "cuda/allocator/caching_allocator.h"
#include "cuda/allocator/simulated_device.h"

namespace vt::cuda::testing {

inline int failures = 0;
/// Line by line, so that what a crashing test said is not lost.
inline const int buffering = std::setvbuf(stdout, nullptr, _IOLBF, 0);

inline void expect(bool ok, const char* what, const char* file, int line) {
  if (ok) return;
  ++failures;
  std::printf("%s:%d: failed: %s\n", file, line, what);
}
#define CHECK(condition) ::vt::cuda::testing::expect((condition), #condition, __FILE__, __LINE__)
#define CHECK_EMPTY(text) ::vt::cuda::testing::expect_empty((text), #text, __FILE__, __LINE__)

inline void expect_empty(const std::string& text, const char* what, const char* file, int line) {
  expect(text.empty(), (std::string(what) + ": " + text).c_str(), file, line);
}

/// The error that `f` throws as {kind, message}; {Runtime, ""} when it throws none.
template <class F>
std::pair<ErrorKind, std::string> error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.kind(), e.message()};
  }
  return {ErrorKind::Runtime, ""};
}
inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline constexpr size_t KiB = size_t{1} << 10;
inline constexpr size_t MiB = size_t{1} << 20;

inline uintptr_t address_of(const Allocation& a) { return reinterpret_cast<uintptr_t>(a.data); }
inline void give_back(const Allocation& a) {
  if (a.release) a.release(a.context, a.data, a.nbytes);
}

/// The number after `name` in the environment, else `otherwise`.
inline uint64_t environment_number(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

inline int finish(const char* test) {
  if (failures == 0) std::printf("%s: ok\n", test);
  return failures != 0;
}

}  // namespace vt::cuda::testing
