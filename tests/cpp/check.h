// CHECK for the C++ tests: says what failed and goes on, so that one run shows every failure.
#pragma once

#include <atomic>
#include <cstdio>

namespace vt::test {

inline std::atomic<int> failures = 0;  // threads of a test check, too

inline void expect(bool ok, const char* what, const char* file, int line) {
  if (ok) return;
  ++failures;
  std::printf("%s:%d: failed: %s\n", file, line, what);
}

}  // namespace vt::test

#define CHECK(condition) vt::test::expect((condition), #condition, __FILE__, __LINE__)
