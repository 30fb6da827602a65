// What a library in the place of cuBLASLt has been asked, and which of its calls is to fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

/// An algorithm that the fake offers. configuration: by the attributes' numbers, 0 to 8.
struct FakeAnswer {
  size_t workspace = 0;
  uint32_t configuration[9] = {};
  int state = 0;
  int untold = -1;  // the attribute that cannot be read
};

struct FakeCublasLt {
  int64_t calls = 0;
  int64_t fail_at = 0;  // the call with this number, counted from 1, fails
  int64_t handles = 0;
  int64_t descriptions = 0;  // alive: descriptors, layouts, preferences
  size_t workspace = 0;      // that its algorithms ask for
  /// What it offers in the place of that, best first.
  std::vector<FakeAnswer> answers;
  int64_t asked = 0;  // for answers
  int most_wanted = 0;
  size_t allowed_workspace = 0;       // by the preference
  uint32_t allowed_reductions = ~0u;  // likewise; all bits where it said nothing
  bool ignores_limits = false;        // offers also what needs more than is allowed
  int64_t last_algorithm = 0;         // that a product was issued with: its place among the answers
  void* last_workspace = nullptr;
  size_t last_bytes = 0;
  void (*on_product)() = nullptr;  // called as a product is issued
};
