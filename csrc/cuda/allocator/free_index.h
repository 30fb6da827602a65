// The free blocks of one kind, segregated by size: 16 bins a power of two, found through a bitmap
// in constant time. Up to 16 KiB each size has a bin of its own; above, a bin spans 1/16 of its
// power of two, and the best fit among its first blocks is taken.
#pragma once

#include <algorithm>
#include <array>
#include <bit>

#include "cuda/allocator/block.h"

namespace vt::cuda {

class FreeIndex {
 public:
  void insert(Block* block) {
    const int bin = bin_of(block->size);
    block->list_prev = nullptr;
    block->list_next = heads_[bin];
    if (heads_[bin]) heads_[bin]->list_prev = block;
    heads_[bin] = block;
    bitmap_[bin / 64] |= uint64_t{1} << (bin % 64);
    ++count_;
    bytes_ += block->size;
  }

  void remove(Block* block) {
    const int bin = bin_of(block->size);
    if (block->list_next) block->list_next->list_prev = block->list_prev;
    if (block->list_prev) {
      block->list_prev->list_next = block->list_next;
    } else {
      heads_[bin] = block->list_next;
      if (!heads_[bin]) bitmap_[bin / 64] &= ~(uint64_t{1} << (bin % 64));
    }
    block->list_next = block->list_prev = nullptr;
    --count_;
    bytes_ -= block->size;
  }

  /// A block of `size` to `largest` bytes, still in the index; null if there is none.
  Block* find(size_t size, size_t largest) const {
    const int own = bin_of(size);
    if (Block* block = best_in(heads_[own], size, largest, kOwnBinScan)) return block;
    for (int bin = next_bin(own + 1); bin >= 0; bin = next_bin(bin + 1)) {
      if (Block* block = best_in(heads_[bin], size, largest, kNextBinScan)) return block;
      if (heads_[bin]->size > largest) return nullptr;  // as is all that follows
    }
    return nullptr;
  }

  /// Size of the largest block; 0 when there is none.
  size_t largest() const {
    for (int i = kBins / 64; i-- > 0;) {
      if (!bitmap_[i]) continue;
      size_t largest = 0;
      const int bin = i * 64 + 63 - std::countl_zero(bitmap_[i]);
      for (const Block* block = heads_[bin]; block; block = block->list_next) {
        largest = std::max(largest, block->size);
      }
      return largest;
    }
    return 0;
  }

  size_t count() const { return count_; }
  size_t bytes() const { return bytes_; }

  template <class F>
  void for_each(F&& visit) const {
    for (int bin = next_bin(0); bin >= 0; bin = next_bin(bin + 1)) {
      for (const Block* block = heads_[bin]; block; block = block->list_next) visit(*block);
    }
  }

  static constexpr int kBins = 40 * 16;
  static int bin_of(size_t size) {
    const uint64_t units = size / kBlockAlignment;
    if (units < 16) return static_cast<int>(units);
    const int log2 = 63 - std::countl_zero(units);
    const int bin = (log2 - 3) * 16 + static_cast<int>((units >> (log2 - 4)) & 15);
    return bin < kBins ? bin : kBins - 1;
  }

 private:
  static constexpr int kOwnBinScan = 64;
  static constexpr int kNextBinScan = 16;

  static Block* best_in(Block* block, size_t size, size_t largest, int scan) {
    Block* best = nullptr;
    for (; block && scan > 0; block = block->list_next, --scan) {
      if (block->size < size || block->size > largest) continue;
      if (!best || block->size < best->size ||
          (block->size == best->size && block->address < best->address)) {
        best = block;
        if (best->size == size) break;
      }
    }
    return best;
  }

  int next_bin(int from) const {
    if (from >= kBins) return -1;
    uint64_t word = bitmap_[from / 64] & (~uint64_t{0} << (from % 64));
    for (int i = from / 64;; word = bitmap_[i]) {
      if (word) return i * 64 + __builtin_ctzll(word);
      if (++i == kBins / 64) return -1;
    }
  }

  std::array<Block*, kBins> heads_{};
  std::array<uint64_t, kBins / 64> bitmap_{};
  size_t count_ = 0;
  size_t bytes_ = 0;
};

}  // namespace vt::cuda
