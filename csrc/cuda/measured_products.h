// Which of cuBLASLt's algorithms a product gets where one was measured to be faster than the
// library's first answer: rows by GPU and product, made by bench/tune.py or torch.cuda.tunable. A
// row names an algorithm by its configuration, as the library tells it; the bits of an algorithm
// mean nothing to another version. Rows are asked for when a plan is made, never at a product.
// Needs neither CUDA nor cuBLASLt.
#pragma once

#include <atomic>
#include <compare>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "core/dtype.h"

namespace vt::cuda {

/// What the library says of an algorithm (cublasLtMatmulAlgoConfigAttributes_t, by number).
struct AlgorithmConfiguration {
  int32_t id = 0;
  uint32_t tile = 0;
  int32_t split_k = 0;
  uint32_t reduction = 0, swizzle = 0, custom = 0, stages = 0;
  uint16_t inner = 0, cluster = 0;
  bool operator==(const AlgorithmConfiguration&) const = default;
};
std::string describe(const AlgorithmConfiguration& configuration);

enum ProductFlag : int32_t {
  kTransposeA = 1,
  kTransposeB = 2,
  kBias = 4,
  kTf32 = 8,
  kAccumulate = 16,  // the result is read: beta is not 0
};

/// A product as rows know it: strides and alignments are not in it. `epilogue` is a GemmEpilogue.
struct ProductSignature {
  DType dtype = DType::Float32;
  int32_t flags = 0, epilogue = 0;
  int64_t batch = 1, m = 0, n = 0, k = 0;
  auto operator<=>(const ProductSignature&) const = default;
};
/// "bfloat16 nt batch=1 m=384 n=1152 k=16384, added".
std::string describe(const ProductSignature& product);

struct MeasuredProduct {
  const char* gpu;  // as the driver names it
  ProductSignature product;
  AlgorithmConfiguration algorithm;
};

/// The rows that were compiled in. Generated from cute_kernels/tuning.
std::span<const MeasuredProduct> compiled_products();

/// The measured algorithm of a product on a GPU of this name. Nothing while rows are disabled.
std::optional<AlgorithmConfiguration> measured_algorithm(std::string_view gpu,
                                                         const ProductSignature& product);

struct AddedProduct {
  ProductSignature product;
  AlgorithmConfiguration algorithm;
};
/// Rows that go before those compiled in, and before those added earlier.
void add_measured_products(const std::string& gpu, std::span<const AddedProduct> rows);
/// Forgets what was added.
void remove_added_products();

/// Whether rows are looked at. VT_MEASURED_PRODUCTS=0 disables them from the start.
bool measured_products_enabled();
void enable_measured_products(bool on);

namespace detail {
inline std::atomic<uint32_t> measured_products_version{1};
}
/// Another number once what a product gets may have changed: plans made before are made again.
inline uint32_t measured_products_version() {
  return detail::measured_products_version.load(std::memory_order_acquire);
}

}  // namespace vt::cuda
