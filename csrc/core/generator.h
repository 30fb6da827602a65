// Random number generators: Philox4x32-10, a counter-based generator whose state is a seed and an
// offset. An op reserves a range of counters up front, so its numbers do not depend on threads
// and a recorded op draws the same numbers again.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "core/device.h"
#include "core/ref.h"

namespace vt {

/// The counters one op may use: element i of the op uses counter `offset + i / 4`, lane `i % 4`.
struct PhiloxArgs {
  uint64_t seed = 0;
  uint64_t offset = 0;
  /// Set where a device program draws: {seed, offset} in the device's memory, read as the kernel
  /// runs; `offset` counts from there, and `seed` is not used.
  const uint64_t* state = nullptr;
};

class GeneratorImpl final : public RefCounted {
 public:
  explicit GeneratorImpl(Device device) : device_(device) {}
  Device device() const { return device_; }
  uint64_t seed() const;
  void set_seed(uint64_t seed);  // also resets the offset
  uint64_t offset() const;
  /// Seed and offset, of one moment.
  PhiloxArgs state() const;
  void set_state(uint64_t seed, uint64_t offset);
  /// Reserves `counters` four-wide counters.
  PhiloxArgs reserve(uint64_t counters);

 private:
  mutable std::mutex mutex_;
  uint64_t seed_ = 67280421310721u;
  uint64_t offset_ = 0;
  Device device_;
};
using Generator = Ref<GeneratorImpl>;

/// How often this thread has drawn numbers from generators other than the default ones.
uint64_t own_draws();
void note_own_draw();

/// The process-wide generator of a device.
const Generator& default_generator(Device device);
/// Every default generator: the CPU's, then those of CUDA devices, present or not.
std::vector<const Generator*> default_generators();
/// Seeds every device's default generator.
void manual_seed(uint64_t seed);

/// Ten Philox rounds: four 32-bit numbers from (seed, counter). constexpr, so that device code has
/// the same function.
struct Philox4 {
  uint32_t value[4];
};
constexpr Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0,
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}
/// [0, 1) with 24 bits, the float spacing below 1.
constexpr float uniform_float(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }
/// [0, 1) with 53 bits.
constexpr double uniform_double(uint32_t high, uint32_t low) {
  return static_cast<double>((uint64_t{high} << 21) ^ (uint64_t{low} >> 11)) * 0x1p-53;
}

}  // namespace vt
