// A product as cuBLASLt wants it described, and which of the library's algorithms it gets.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/cublaslt_library.h"
#include "cuda/measured_products.h"

namespace vt::cuda::cublaslt {

/// What a plan depends on; all bytes count, so there is no padding.
struct Key {
  int64_t batch, m, n, k, lda, ldb, ldc, step_a, step_b, step_c;
  int32_t dtype, device;
  int32_t flags;      // ProductFlag
  int32_t alignment;  // of the operands, bytes, a power of two
  int32_t epilogue;
  int32_t float8;  // the dtypes of b and c, and how sums are made; 0 for other products
  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(std::has_unique_object_representations_v<Key>);
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t words[sizeof(Key) / 8], h = 0x9E3779B97F4A7C15u;
    std::memcpy(words, &key, sizeof key);
    for (const uint64_t w : words) h = (h ^ w) * 0xD6E8FEB86659FD93u, h ^= h >> 32;
    return h;
  }
};

/// The key of a problem on a device.
Key key_of(const GemmProblem& problem, int device);
/// Rows are of products of floats that have 16 bits or more.
bool may_have_rows(const Key& key);
/// What rows call it.
ProductSignature signature_of(const Key& key);

/// Descriptions, and the algorithm once it is chosen.
struct Plan {
  Description op = nullptr, a = nullptr, b = nullptr, c = nullptr;
  Algorithm algorithm{};
  size_t workspace = 0;  // bytes
  bool usable = false;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan();
};

/// Fills in the descriptions; nothing is chosen yet.
void describe(Plan& plan, const Key& key, const Float8Operands& float8);
/// The scales of 8-bit operands, which are addresses and change from product to product.
void set_scales(const Plan& plan, const Float8Operands& float8);

/// An algorithm that the library offers for a plan, and what it asks for.
struct Answer {
  Algorithm algorithm{};
  size_t workspace = 0;  // bytes
  AlgorithmConfiguration configuration;
};

/// What a product gets that nothing was measured for: `answer` as it is offered first. False if the
/// library has none.
bool first_answer(const Plan& plan, const Key& key, Answer& answer);
/// The answers that a row may name, the library's best guess first; no two have one configuration.
std::vector<Answer> answers_of(const Plan& plan, const Key& key);
/// The configuration of an algorithm; false if the library does not tell.
bool configuration_of(const Algorithm& algorithm, AlgorithmConfiguration& configuration);

/// Chooses the plan's algorithm: the one that was measured to be fastest, else the first answer.
void choose(Plan& plan, const Key& key);

/// Issues the planned product on a stream.
void issue(const Plan& plan, const GemmProblem& problem, Stream stream);

}  // namespace vt::cuda::cublaslt
