// Calls a compiled CuTe object by its exported C interface, as its contract has it: for objects
// that come while the program runs, which have no generated code of their own (launch_table.py
// makes the same for those that are linked in). Needs no CUDA.
#pragma once

#include "cuda/cute/contract.h"

namespace vt::cuda::cute {

/// What the DSL exports for a function: the addresses of its arguments, of the stream and, last, of
/// the number that it returns.
using Entry = void (*)(void** arguments, int32_t count);

inline constexpr size_t kMaxTensors = 16;
inline constexpr size_t kMaxScalars = 16;

/// Calls `entry` and gives back its number, the launch's cudaError_t. A tensor goes as an address,
/// its extents as int32 and the strides of all dimensions but the last as int64. The call has been
/// checked against `tensors`; it has at most kMaxTensors and kMaxScalars.
int32_t enter_packed(Entry entry, const TensorRule* tensors, std::span<const ScalarType> types,
                     const Call& call, void* stream);

}  // namespace vt::cuda::cute
