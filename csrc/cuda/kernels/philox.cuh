// Philox4x32-10 on the device: the numbers core/generator.h gives for the same seed and counter.
#pragma once

#include <cstdint>

#include "core/generator.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// What a kernel draws from. With `state`, device memory holds {seed, offset} and `offset` counts
/// from there: a captured op draws new numbers in each replay.
struct PhiloxState {
  uint64_t seed = 0;
  uint64_t offset = 0;
  const uint64_t* state = nullptr;

  PhiloxState() = default;
  explicit PhiloxState(const PhiloxArgs& args)
      : seed(args.seed), offset(args.offset), state(args.state) {}
};

/// The numbers of one op: seed and first counter, read once a thread.
class PhiloxStream {
 public:
  __device__ explicit PhiloxStream(const PhiloxState& from)
      : seed_(from.state ? from.state[0] : from.seed),
        first_(from.state ? from.state[1] + from.offset : from.offset) {}

  /// The four numbers of the op's counter `index`.
  __device__ Philox4 operator()(uint64_t index) const {
    const uint64_t counter = first_ + index;
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }

 private:
  uint64_t seed_, first_;
};

__device__ inline uint64_t wide(uint32_t high, uint32_t low) { return uint64_t{high} << 32 | low; }
/// [0, 1) with 53 bits.
__device__ inline double half_open_uniform(uint32_t high, uint32_t low) {
  return static_cast<double>(wide(high, low) >> 11) * 0x1p-53;
}
/// Open (0, 1): no end is hit, so a logarithm of it is finite and not 0.
__device__ inline float open_uniform(uint32_t bits) {
  return static_cast<float>(bits >> 9) * 0x1p-23f + 0x1p-24f;
}
__device__ inline double open_uniform(uint64_t bits) {
  return static_cast<double>(bits >> 12) * 0x1p-52 + 0x1p-53;
}

}  // namespace vt::cuda
