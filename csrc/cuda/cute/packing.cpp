#include "cuda/cute/packing.h"

#include <cstring>

#include "core/error.h"

namespace vt::cuda::cute {
namespace {

/// `struct { void* data; int32_t dynamic_shapes[d]; int64_t dynamic_strides[d - 1]; }`
struct PackedTensor {
  static constexpr size_t kStridesAt = sizeof(void*) + sizeof(int32_t) * kMaxDims;
  alignas(8) std::byte bytes[kStridesAt + sizeof(int64_t) * (kMaxDims - 1)];

  void pack(const Operand& t, const TensorRule& rule, const Call& call) {
    std::memcpy(bytes, &t.data, sizeof(void*));
    std::byte* to = bytes + sizeof(void*);
    for (int d = 0; d < rule.dims; ++d, to += sizeof(int32_t)) {
      const auto extent = static_cast<int32_t>(call.extents[rule.extents[d]]);
      std::memcpy(to, &extent, sizeof extent);
    }
    if (rule.dims % 2 != 0) to += sizeof(int32_t);  // strides are aligned as they are in C
    std::memcpy(to, t.strides.data(), sizeof(int64_t) * (static_cast<size_t>(rule.dims) - 1));
  }
};

}  // namespace

int32_t enter_packed(Entry entry, const TensorRule* tensors, std::span<const ScalarType> types,
                     const Call& call, void* stream) {
  check(call.tensors.size() <= kMaxTensors && call.scalars.size() <= kMaxScalars &&
            call.scalars.size() == types.size(),
        "a CuTe kernel takes at most ", kMaxTensors, " tensors and ", kMaxScalars, " numbers");
  PackedTensor packed[kMaxTensors];
  Scalar scalars[kMaxScalars];
  void* arguments[kMaxTensors + kMaxScalars + 2];
  int32_t count = 0, result = 0;
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    packed[i].pack(call.tensors[i], tensors[i], call);
    arguments[count++] = packed[i].bytes;
  }
  // All members of the union begin where it does.
  for (size_t i = 0; i < call.scalars.size(); ++i) {
    scalars[i] = call.scalars[i];
    arguments[count++] = &scalars[i];
  }
  arguments[count++] = &stream;
  arguments[count++] = &result;
  entry(arguments, count);
  return result;
}

}  // namespace vt::cuda::cute
