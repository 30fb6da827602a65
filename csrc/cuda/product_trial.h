// What measuring cuBLASLt's algorithms needs: which products a process had, and a product whose
// answers can be run one by one.
#pragma once

#include <memory>
#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/measured_products.h"

namespace vt::cuda {

/// A product of floats as it was planned: strides in elements, the alignment of all its operands in
/// bytes.
struct SeenProduct {
  ProductSignature product;
  int64_t lda, ldb, ldc, step_a, step_b, step_c;
  int32_t alignment, device;
};
/// The first few thousand of the process, in no order.
std::vector<SeenProduct> seen_products();

/// The answers that a row may name for a problem. Number 0 is the one that it gets without a row.
/// The problem's memory must stay as long as its products run. For one thread.
class ProductTrial {
 public:
  /// Throws where the library has no algorithm.
  ProductTrial(const GemmProblem& problem, int device);
  ~ProductTrial();

  size_t answers() const;
  const AlgorithmConfiguration& configuration(size_t answer) const;
  size_t workspace(size_t answer) const;  // bytes
  void run(size_t answer, cudaStream_t stream);

 private:
  struct Made;
  GemmProblem problem_;
  int device_;
  std::unique_ptr<Made> made_;
};

}  // namespace vt::cuda
