// Rounding up or down at random (stochastic rounding), the same on every device: a bfloat16 is
// right on average, where rounding to the nearest would lose updates smaller than half its spacing.
// Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015.
#pragma once

#include <cstdint>

#include "core/generator.h"

namespace vt {

/// Elements of a tensor that one block of counters serves, two to a counter. Every tensor of a list
/// starts a block.
inline constexpr int64_t kRoundedChunk = 8192;

/// The numbers that element i of a chunk rounds with, 16 bits each for parameter, first moment,
/// second moment and its largest value: counter i / 2 has eight.
struct RoundingBits {
  uint32_t word[2];
};
constexpr RoundingBits rounding_bits(const Philox4& drawn, int64_t i) {
  const int at = i % 2 == 0 ? 0 : 2;
  return {{drawn.value[at], drawn.value[at + 1]}};
}
/// The upper half of a finite float's bits, which are a bfloat16, one up in magnitude with the
/// chance that the lower half is of 2^16. `random`: 16 bits.
constexpr uint16_t round_at_random(uint32_t bits, uint32_t random) {
  return static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16);
}
/// Whether those bits are inf or NaN, which have no neighbour to choose from.
constexpr bool is_not_finite(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

}  // namespace vt
