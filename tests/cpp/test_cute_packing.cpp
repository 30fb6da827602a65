// The arguments of a compiled CuTe object as enter_packed passes them. No GPU, no CUDA.
#include "cuda/cute/packing.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace vt;
using namespace vt::cuda::cute;

namespace {

void expect(bool ok, const char* what, int line) {
  if (ok) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::exit(1);
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

// As the exported headers declare them, for one to four dimensions.
struct Vector {
  void* data;
  int32_t dynamic_shapes[1];
};
struct Matrix {
  void* data;
  int32_t dynamic_shapes[2];
  int64_t dynamic_strides[1];
};
struct Batch {
  void* data;
  int32_t dynamic_shapes[3];
  int64_t dynamic_strides[2];
};
struct Heads {
  void* data;
  int32_t dynamic_shapes[4];
  int64_t dynamic_strides[3];
};

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

template <class T>
T read(void* argument) {
  T value;
  std::memcpy(&value, argument, sizeof value);
  return value;
}

bool called = false;

void entry(void** arguments, int32_t count) {
  called = true;
  EXPECT(count == 10);
  const auto v = read<Vector>(arguments[0]);
  EXPECT(v.data == at(0x10) && v.dynamic_shapes[0] == 5);
  const auto m = read<Matrix>(arguments[1]);
  EXPECT(m.data == at(0x20) && m.dynamic_shapes[0] == 3 && m.dynamic_shapes[1] == 5);
  EXPECT(m.dynamic_strides[0] == int64_t{1} << 40);
  const auto b = read<Batch>(arguments[2]);
  EXPECT(b.data == nullptr && b.dynamic_shapes[0] == 2 && b.dynamic_shapes[1] == 3);
  EXPECT(b.dynamic_shapes[2] == 5 && b.dynamic_strides[0] == 15 && b.dynamic_strides[1] == 5);
  const auto h = read<Heads>(arguments[3]);
  EXPECT(h.data == at(0x40) && h.dynamic_shapes[0] == 2 && h.dynamic_shapes[3] == 5);
  EXPECT(h.dynamic_strides[0] == 60 && h.dynamic_strides[1] == 20 && h.dynamic_strides[2] == 5);
  EXPECT(read<float>(arguments[4]) == 1.5f);
  EXPECT(read<int32_t>(arguments[5]) == -7);
  EXPECT(read<int64_t>(arguments[6]) == int64_t{1} << 35);
  EXPECT(read<uint64_t>(arguments[7]) == ~uint64_t{0});
  EXPECT(read<void*>(arguments[8]) == at(0x99));  // the stream
  const int32_t result = 701;
  std::memcpy(arguments[9], &result, sizeof result);
}

}  // namespace

int main() {
  const int64_t extents[] = {2, 3, 5, 4};
  const TensorRule rules[] = {
      {DType::Float32, 1, {2}, Access::Read, 4, 1, false, 0u},
      {DType::Float32, 2, {1, 2}, Access::Read, 4, 1, false, 0u},
      {DType::Float32, 3, {0, 1, 2}, Access::Read, 4, 1, true, 0u},
      {DType::Float32, 4, {0, 1, 3, 2}, Access::Write, 4, 1, false, 0u},
  };
  Operand tensors[] = {{at(0x10), DType::Float32},
                       {at(0x20), DType::Float32, int64_t{1} << 40},
                       {nullptr, DType::Float32},
                       {at(0x40), DType::Float32}};
  tensors[2].strides = {15, 5, 0};
  tensors[3].strides = {60, 20, 5};
  const ScalarType types[] = {ScalarType::f32, ScalarType::i32, ScalarType::i64, ScalarType::u64};
  const Scalar scalars[] = {
      {.f32 = 1.5f}, {.i32 = -7}, {.i64 = int64_t{1} << 35}, {.u64 = ~uint64_t{0}}};
  EXPECT(enter_packed(entry, rules, types, {extents, tensors, scalars}, at(0x99)) == 701);
  EXPECT(called);
  // More than there is room for.
  const std::vector<Operand> many(kMaxTensors + 1);
  bool refused = false;
  try {
    enter_packed(entry, rules, types, {extents, many, scalars}, nullptr);
  } catch (const std::exception&) {
    refused = true;
  }
  EXPECT(refused);
  return 0;
}
