// NVTX: named ranges and marks that profilers (Nsight) show beside what runs. The library is opened
// at run time; where there is none, or none has been opened, everything here does nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace vt::nvtx {

/// Opens the library at a path, or of that name; false if it cannot be, or is none. The first one
/// that is opened stays.
bool open(const std::string& path);
bool is_open();

/// Nested ranges of the calling thread. Both return the depth, from 0, or a negative number where
/// there is no range.
int push(const char* name);
int pop();
/// A range that any thread may end. 0 without a library.
uint64_t start(const char* name);
void end(uint64_t range);
void mark(const char* name);

/// Whether ops are ranges of their own (mark_ops in dispatch/layers.h).
extern std::atomic<bool> ops_marked;

/// The range of an op, where they are marked.
class OpRange {
 public:
  explicit OpRange(std::string_view name) : marked_(ops_marked.load(std::memory_order_relaxed)) {
    if (marked_) [[unlikely]]
      push(std::string(name).c_str());
  }
  ~OpRange() {
    if (marked_) [[unlikely]]
      pop();
  }
  OpRange(const OpRange&) = delete;
  OpRange& operator=(const OpRange&) = delete;

 private:
  const bool marked_;
};

}  // namespace vt::nvtx
