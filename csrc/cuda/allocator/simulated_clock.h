// Vector clocks of the simulated device: how much of each stream's work comes before something,
// and the last uses of every byte, checked for order.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

namespace vt::cuda {

inline constexpr int kSimulatedStreams = 16;

struct VectorClock {
  std::array<uint32_t, kSimulatedStreams> at{};

  void join(const VectorClock& other) {
    for (int s = 0; s < kSimulatedStreams; ++s) at[s] = at[s] > other.at[s] ? at[s] : other.at[s];
  }
  bool covers(const VectorClock& other) const {
    for (int s = 0; s < kSimulatedStreams; ++s) {
      if (at[s] < other.at[s]) return false;
    }
    return true;
  }
};

/// The last write and the reads since, for every byte range that was used.
class AccessLog {
 public:
  /// Notes a use by the work at `clock` of `stream`. Returns what it is not ordered after, or "".
  std::string use(uintptr_t address, size_t nbytes, bool write, int stream,
                  const VectorClock& clock) {
    std::string wrong;
    const uintptr_t end = address + nbytes;
    cut(address);
    cut(end);
    uintptr_t at = address;
    for (auto it = ranges_.lower_bound(address); at < end;) {
      if (it == ranges_.end() || it->first > at) {
        const uintptr_t stop = it == ranges_.end() || it->first > end ? end : it->first;
        it = ranges_.emplace_hint(it, at, Range{.end = stop});
      }
      Range& range = it->second;
      for (int s = 0; s < kSimulatedStreams; ++s) {
        if (range.written.at[s] > clock.at[s]) wrong = unordered(s, "write", range);
        if (write && range.read.at[s] > clock.at[s]) wrong = unordered(s, "read", range);
      }
      if (write) {
        range.written = range.read = {};
        range.written.at[stream] = clock.at[stream];
      } else {
        range.read.at[stream] = clock.at[stream];
      }
      at = range.end;
      ++it;
    }
    return wrong;
  }

  /// Forgets a range, all of whose uses must come before `clock`; else says which does not.
  std::string forget(uintptr_t address, size_t nbytes, const VectorClock& clock) {
    std::string wrong;
    cut(address);
    cut(address + nbytes);
    auto it = ranges_.lower_bound(address);
    while (it != ranges_.end() && it->first < address + nbytes) {
      for (int s = 0; s < kSimulatedStreams; ++s) {
        if (it->second.written.at[s] > clock.at[s]) wrong = unordered(s, "write", it->second);
        if (it->second.read.at[s] > clock.at[s]) wrong = unordered(s, "read", it->second);
      }
      it = ranges_.erase(it);
    }
    return wrong;
  }

 private:
  struct Range {
    uintptr_t end = 0;
    VectorClock written{};
    VectorClock read{};
  };

  static std::string unordered(int stream, const char* what, const Range& range) {
    const VectorClock& clock = what[0] == 'w' ? range.written : range.read;
    return "a " + std::string(what) + " by work " + std::to_string(clock.at[stream]) +
           " of stream " + std::to_string(stream);
  }
  void cut(uintptr_t at) {
    auto it = ranges_.lower_bound(at);
    if (it == ranges_.begin()) return;
    --it;
    if (it->first >= at || it->second.end <= at) return;
    Range rest = it->second;
    it->second.end = at;
    ranges_.emplace(at, rest);
  }

  std::map<uintptr_t, Range> ranges_;
};

}  // namespace vt::cuda
