// Attention of sequences of several lengths that lie one after the other in memory: each is a
// problem of its own for the blocked kernels, over views of the packed operands.
#pragma once

#include <vector>

#include "cpu/kernels/attention_blocks.h"

namespace vt::cpu::VT_ISA {
namespace attention {

/// The sequences of packed (T, H, D) operands, and how the threads share them.
struct Sequences {
  std::vector<int64_t> query_starts, key_starts;  // one more than there are sequences
  std::vector<Problem> problems;
  std::vector<int64_t> first_block;  // of a sequence, among all blocks of queries of all heads

  Sequences(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q,
            const Tensor& cu_seq_k, int64_t left, int64_t right, double scale)
      : query_starts(starts(cu_seq_q, query.sizes()[0], "cu_seq_q")),
        key_starts(starts(cu_seq_k, key.sizes()[0], "cu_seq_k")) {
    int64_t block = 0;
    for (size_t i = 0; i + 1 < query_starts.size(); ++i) {
      Problem& p = problems.emplace_back(queries_of(query, i), keys_of(key, i), keys_of(value, i),
                                         Tensor(), 0.0, false, scale, PhiloxArgs{});
      p.set_window(left, right);
      first_block.push_back(block);
      block += p.heads * ((p.queries + kQueryBlock - 1) / kQueryBlock);
    }
    first_block.push_back(block);
  }

  int64_t blocks() const { return first_block.back(); }
  /// The sequence that a block of queries belongs to.
  size_t of_block(int64_t block) const {
    const auto after = std::upper_bound(first_block.begin(), first_block.end(), block);
    return static_cast<size_t>(after - first_block.begin()) - 1;
  }
  Tensor queries_of(const Tensor& packed, size_t i) const {
    return rows_of(packed, query_starts[i], query_starts[i + 1]);
  }
  Tensor keys_of(const Tensor& packed, size_t i) const {
    return rows_of(packed, key_starts[i], key_starts[i + 1]);
  }
  /// Writes `value` where no sequence lies along dimension `dim`.
  static void clear_uncovered(const std::vector<int64_t>& starts, const Tensor& t, int64_t dim,
                              double value) {
    const int64_t tokens = t.sizes()[dim];
    for (const auto& [begin, end] :
         {std::pair{int64_t{0}, starts.front()}, std::pair{starts.back(), tokens}}) {
      if (begin >= end) continue;
      Dims sizes(t.sizes());
      sizes[dim] = end - begin;
      const Tensor part =
          make_view(t, sizes, t.strides(), t.storage_offset() + begin * t.strides()[dim]);
      kernels_for(DeviceType::CPU).fill_(part, wrapped_scalar(Scalar(value)));
    }
  }

 private:
  /// Where sequences begin, and the last one ends. Throws for what does not lie within the tokens.
  static std::vector<int64_t> starts(const Tensor& cumulative, int64_t tokens,
                                     std::string_view name) {
    const Tensor numbers = dense_as(cumulative, DType::Int64);
    const int64_t* data = numbers.data_as<int64_t>();
    std::vector<int64_t> result(data, data + numbers.numel());
    for (size_t i = 0; i < result.size(); ++i) {
      check(result[i] >= (i == 0 ? 0 : result[i - 1]) && result[i] <= tokens, "varlen_attn: ", name,
            " must rise from 0 to at most the ", tokens, " tokens, but its element ", i, " is ",
            result[i]);
    }
    return result;
  }
  /// Tokens [begin, end) of (T, H, D) as (1, H, T, D).
  static Tensor rows_of(const Tensor& t, int64_t begin, int64_t end) {
    const auto n = t.sizes(), s = t.strides();
    return make_view(t, Dims{1, n[1], end - begin, n[2]}, Dims{0, s[1], s[0], s[2]},
                     t.storage_offset() + begin * s[0]);
  }
};

}  // namespace attention
}  // namespace vt::cpu::VT_ISA
