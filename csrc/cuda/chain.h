// A chain of pointwise ops (_fused_pointwise) as a kernel made for it: the source, and what a
// launch of it is told. Kernels are compiled by NVRTC once for each structure (ops, dtypes, how
// operands are walked); sizes, strides and numbers are arguments.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/scalar.h"
#include "core/small_vector.h"
#include "core/tensor.h"
#include "vt/op_ids.h"

namespace vt::cuda {

inline constexpr int kChainOperands = 12;  // in memory of the device
inline constexpr int kChainNumbers = 32;
inline constexpr int kChainRowDims = 6;  // dimensions that count rows
inline constexpr int kChainBlock = 256;

/// Division of a 31-bit number by a fixed one; as FastDivisor of kernels/offsets.cuh.
struct ChainDivisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  ChainDivisor() = default;
  explicit ChainDivisor(uint32_t d) : divisor(d) {
    while (shift < 32 && (uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

/// What a kernel is told. The same as Arguments in kernels/chain_prelude.cuh.
struct ChainArguments {
  char* data[kChainOperands] = {};
  double number[kChainNumbers] = {};
  int64_t stride[kChainOperands][kChainRowDims] = {};
  ChainDivisor extent[kChainRowDims];
  ChainDivisor pieces;
  uint32_t n = 0;
};

struct ChainOperand {
  enum class Walk : uint8_t {
    Register,  // not in memory
    Number,    // of the host
    Single,    // one element for all
    Flat,      // dense in the order of the chain
    Row,       // rows that are dense
    Column,    // one element a row
    Strided
  };
  Walk walk = Walk::Register;
  DType dtype = DType::Float32;
  int64_t size = 0;  // of an element
  char* data = nullptr;
  Scalar number;
  int place = -1;  // among those in memory
  bool read_first = false, written = false;
  SmallVector<int64_t, 6> strides;  // bytes, slowest dimension first
};

struct ChainStep {
  OpId id{};
  DType compute = DType::Float32;
  int out = 0;
  std::vector<int> inputs;
  std::span<const Scalar> attributes;
};

/// The program of _fused_pointwise read and laid out.
struct Chain {
  Device device;
  std::vector<ChainOperand> operands;
  std::vector<ChainStep> steps;
  SmallVector<int64_t, 6> shape;  // slowest dimension first
  int64_t numel = 1;
  int width = 1;  // elements of one access
  int unroll = 1;
  bool rows = false;  // whether operands are walked by rows, else all as one dense row

  Chain(TensorSpan results, TensorSpan tensors, IntSpan sizes, IntSpan program,
        std::span<const Scalar> numbers);

 private:
  void read_program(IntSpan program, std::span<const Scalar> numbers);
  void lay_out(IntSpan sizes);
  bool fits(int64_t width) const;
  void choose_width();
};

/// The kernel's source, without what all begin with, and the numbers it takes.
struct ChainSource {
  std::string name;  // of the kernel: profilers show its ops
  std::string text;
  std::vector<double> numbers;
};
ChainSource chain_source(const Chain& chain);
/// What all sources begin with.
const std::string& chain_prelude();

}  // namespace vt::cuda
