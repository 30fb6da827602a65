// What a CuTe kernel may be given. The rules come from the contracts in cute_kernels (generated
// table.cpp); a call is checked against them before a launch, because the compiled code trusts
// them. A call that does not fit is an answer, not an error: the caller takes its other path.
// Needs no CUDA.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/dtype.h"

namespace vt::cuda::cute {

inline constexpr int kMaxDims = 4;
inline constexpr int kMaxExtents = 8;

/// A tensor argument: where it is and the strides of all dimensions but the last, in elements. The
/// last is dense. Null where an optional tensor is absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::Float32;
  std::array<int64_t, kMaxDims - 1> strides{};

  Operand() = default;
  Operand(const void* where, DType type, int64_t row_stride = 0)
      : data(const_cast<void*>(where)), dtype(type), strides{row_stride, 0} {}
};

union Scalar {
  float f32;
  int32_t i32;
  int64_t i64;
  uint64_t u64;
};
enum class ScalarType : uint8_t { f32, i32, i64, u64 };

/// The arguments of one launch, in the order of the contract.
struct Call {
  std::span<const int64_t> extents;
  std::span<const Operand> tensors;
  std::span<const Scalar> scalars;
};

/// A call with its arrays, as the generated argument structures give it.
template <size_t Extents, size_t Tensors, size_t Scalars>
struct Values {
  std::array<int64_t, Extents> extents;
  std::array<Operand, Tensors> tensors;
  std::array<Scalar, Scalars> scalars;
  Call call() const { return {extents, tensors, scalars}; }
};

struct ExtentRule {
  int64_t divisible_by, minimum, maximum;
};

enum class Access : uint8_t { Read, Write, Update };

struct TensorRule {
  DType dtype;
  uint8_t dims;
  uint8_t extents[kMaxDims];  // which extent each dimension is
  Access access;
  int16_t align;  // bytes
  int16_t stride_divisible_by;
  bool optional;
  uint32_t may_alias;  // bit i: tensor i
};

enum class Reason : uint8_t {
  Fits,
  NotCompiled,
  NotLoaded,
  ExtentRange,
  ExtentDivisor,
  Missing,
  Dtype,
  Alignment,
  Stride,
  Overlap,
};

/// Why a variant does not apply: the reason and which extent or tensor it is about.
struct Refusal {
  Reason reason = Reason::Fits;
  int which = -1;
  explicit operator bool() const { return reason != Reason::Fits; }
};

/// The first rule that `call` breaks. `extents` and `tensors` have a rule for each of the call's.
Refusal check_call(const ExtentRule* extents, const TensorRule* tensors, const Call& call);

/// "n = 100 is not a multiple of 8".
std::string describe(Refusal refusal, const ExtentRule* extents, const TensorRule* tensors,
                     const Call& call, std::span<const char* const> extent_names,
                     std::span<const char* const> tensor_names);

}  // namespace vt::cuda::cute
