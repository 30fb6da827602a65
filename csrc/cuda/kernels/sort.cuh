// Stable sorting of (key, position) pairs on the device; CUB's radix sort, compiled once.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/kernels/launch.cuh"

namespace vt::cuda {

/// Sorts pairs by the lowest `bits` bits of their keys. `n` < 2^32.
template <class Key>  // uint32_t or uint64_t
void sort_pairs(const Launch& launch, const Key* keys, Key* sorted_keys, const uint32_t* values,
                uint32_t* sorted_values, int64_t n, int bits);

/// Bits that hold every number below `n`, at least one.
inline int bits_below(int64_t n) {
  return n <= 2 ? 1 : static_cast<int>(std::bit_width(static_cast<uint64_t>(n - 1)));
}

}  // namespace vt::cuda
