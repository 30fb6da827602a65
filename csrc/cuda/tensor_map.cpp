#include "cuda/tensor_map.h"

#include <array>

#include "cuda/driver_function.h"

namespace vt::cuda {
namespace {

decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    decltype(&cuTensorMapEncodeTiled) found = nullptr;
    find_driver_function(found, "cuTensorMapEncodeTiled");
    return found;
  }();
  return function;
}

}  // namespace

bool describe_rows(CUtensorMap& map, const Tensor& operand, int rows) {
  const auto encode = encoder();
  if (!encode) return false;
  const auto sizes = operand.sizes(), strides = operand.strides();
  constexpr cuuint32_t kRank = 4;
  std::array<cuuint64_t, kRank> extents{};
  std::array<cuuint64_t, kRank - 1> bytes{};  // from a row, a head and a batch to the next
  for (size_t d = 0; d < kRank; ++d) extents[d] = static_cast<cuuint64_t>(sizes[3 - d]);
  for (size_t d = 0; d + 1 < kRank; ++d) {
    // The stride of a dimension of one element says nothing.
    const int64_t stride = sizes[2 - d] > 1 ? strides[2 - d] : sizes[3];
    bytes[d] = static_cast<cuuint64_t>(stride * 2);
  }
  const std::array<cuuint32_t, kRank> box{64, static_cast<cuuint32_t>(rows), 1, 1};
  const std::array<cuuint32_t, kRank> steps{1, 1, 1, 1};
  const auto type = operand.dtype() == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(&map, type, kRank, operand.data(), extents.data(), bytes.data(), box.data(),
                steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace vt::cuda
