// For kernels that work on dense rows: contiguous operands, rows of 16-bit floats widened to
// float on the way in and rounded once on the way out, and scratch memory a thread keeps.
#pragma once

#include <memory>

#include "core/parallel.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {

/// `t` itself when it is contiguous (or undefined), else a contiguous copy.
inline Tensor dense(const Tensor& t) {
  if (!t.defined() || t.is_contiguous()) return t;
  Tensor out = empty(t.sizes(), t.dtype(), t.device());
  kernels_for(DeviceType::CPU).copy_(out, t, false);
  return out;
}
/// A contiguous copy of `t` as `dtype` (or `t` itself if it already is that).
inline Tensor dense_as(const Tensor& t, DType dtype) {
  if (!t.defined() || (t.dtype() == dtype && t.is_contiguous())) return t;
  Tensor out = empty(t.sizes(), dtype, t.device());
  kernels_for(DeviceType::CPU).copy_(out, t, false);
  return out;
}

/// What a scratch buffer is for; two uses on one thread at a time need two names.
enum class Scratch : int {
  GemmA,
  GemmB,
  GemmC,
  Row0,
  Row1,
  Row2,
  Row3,
  Scores,
  Gradients,
  Query,
  Key,
  Value,
  Output,
  QueryPanels,
  KeyPanels,
  KeyRows,
  ValuePanels,
  GradPanels,
  Extra,
  Columns,
  Registers,
  Count
};
/// `n` uninitialised elements, 64-byte aligned, valid until the thread asks for this buffer again.
template <class T>
T* scratch(Scratch use, int64_t n) {
  struct Buffer {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Scratch::Count)];
  Buffer& buffer = buffers[static_cast<int>(use)];
  const size_t bytes = static_cast<size_t>(n) * sizeof(T) + 64;
  if (buffer.size < bytes) {
    buffer.memory.reset();
    buffer.memory.reset(new char[bytes + bytes / 4]);
    buffer.size = bytes + bytes / 4;
  }
  const uintptr_t start = (reinterpret_cast<uintptr_t>(buffer.memory.get()) + 63) & ~uintptr_t{63};
  return reinterpret_cast<T*>(start);
}

/// Elements [at, at + n) of a dense array of `dtype`, as T: in place, or converted into `buffer`.
template <class T>
const T* load_row(const void* base, DType dtype, int64_t at, int64_t n, T* buffer) {
  if (dtype == DTypeOf<T>::value) return static_cast<const T*>(base) + at;
  const int64_t size = item_size(dtype);
  load_block<T>(buffer, static_cast<const char*>(base) + at * size, size, n, dtype,
                DTypeOf<T>::value);
  return buffer;
}
/// Where a row is to be computed: the output itself, or `buffer` when the output is not of T.
template <class T>
T* row_target(void* base, DType dtype, int64_t at, T* buffer) {
  return dtype == DTypeOf<T>::value ? static_cast<T*>(base) + at : buffer;
}
/// Rounds a row computed in `row` into the output, if it was not computed in place.
template <class T>
void store_row(void* base, DType dtype, int64_t at, int64_t n, const T* row) {
  if (dtype == DTypeOf<T>::value) return;
  const int64_t size = item_size(dtype);
  store_block<T>(static_cast<char*>(base) + at * size, size, row, n, dtype);
}

/// Rows a thread should take at a time, so that a part is about 16k elements.
inline int64_t row_grain(int64_t row_length) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(row_length, 1));
}

}  // namespace vt::cpu::VT_ISA
