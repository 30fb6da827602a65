// What a library in the place of cuBLASLt has been asked, and which of its calls is to fail.
#pragma once

#include <cstddef>
#include <cstdint>

struct FakeCublasLt {
  int64_t calls = 0;
  int64_t fail_at = 0;  // the call with this number, counted from 1, fails
  int64_t handles = 0;
  int64_t descriptions = 0;  // alive: descriptors, layouts, preferences
  size_t workspace = 0;      // that its algorithms ask for
  void* last_workspace = nullptr;
  size_t last_bytes = 0;
  void (*on_product)() = nullptr;  // called as a product is issued
};
