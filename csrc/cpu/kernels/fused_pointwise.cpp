// _fused_pointwise: pointwise ops one after the other on each block of elements. A block stays in
// the cache from op to op, so a chain reads and writes memory once. Every op runs by its own kernel
// on its own dtypes: the bits are those of the ops apart.
//
// Elements are numbered in the order of the first output's memory. An operand that lies in this
// order is used where it is; any other (a broadcast row, a transposed tensor) is gathered into a
// dense register at the start of a block and, if it is written, scattered at its end. 16-bit floats
// are floats within a block, rounded to their dtype whenever they are written. Within a block ops
// run in their order, and an operand is one view: an output may therefore lie where an input lies
// that no later op reads.
#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/small_vector.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/rows.h"
#include "dispatch/pointwise.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kCacheBytes = 32768;  // of one block of every operand
constexpr int64_t kLeast = 2048, kMost = 4096;
constexpr int64_t kGrainWork = 65536;  // elements times ops that a thread does at least
constexpr int64_t kMaxFused = 1024;    // operands, and ops

enum class Place : uint8_t { Flat, Single, Gathered, Register };

struct Operand {
  Place place = Place::Register;
  DType dtype = DType::Float32;
  bool is_number = false;
  bool read_first = false, written = false;
  bool wide = false;  // a 16-bit float that is a float within a block
  int64_t size = 0;   // of an element
  char* data = nullptr;
  int64_t offset = 0;               // of its register in a thread's memory
  int64_t gathered = 0;             // of what is gathered before it is widened
  SmallVector<int64_t, 6> strides;  // bytes, slowest dimension first
};

struct Instruction {
  OpId id{};
  PointwiseKernel kernel = nullptr;
  DType compute = DType::Float32;
  int first = 0, count = 0;  // of its operands in `used`, the written one first
  bool round = false;        // what it writes is wide and read again
  std::span<const Scalar> attributes;
};

/// Values converted once for all blocks: a number beside a tensor.
struct Converted {
  alignas(8) char value[8];
};

struct Chain {
  SmallVector<int64_t, 6> shape;  // slowest dimension first
  int64_t numel = 1;
  SmallVector<Operand, 16> operands;
  SmallVector<Instruction, 16> instructions;
  SmallVector<int, 64> used;
  SmallVector<Converted, 16> converted;
  int64_t block = 0, scratch = 0;
};

/// Reads the program, checking what it refers to.
class Reader {
 public:
  Reader(IntSpan program, std::span<const Scalar> numbers) : program_(program), numbers_(numbers) {}
  int64_t next() {
    check(at_ < program_.size(), "_fused_pointwise: the program ends early");
    return program_[at_++];
  }
  int64_t next(int64_t limit, const char* what) {
    const int64_t value = next();
    check(value >= 0 && value < limit, "_fused_pointwise: ", what, " ", value, " of ", limit);
    return value;
  }
  std::span<const Scalar> attributes(int64_t n) {
    check(number_ + static_cast<size_t>(n) <= numbers_.size(),
          "_fused_pointwise: too few numbers for the program");
    number_ += static_cast<size_t>(n);
    return numbers_.subspan(number_ - static_cast<size_t>(n), static_cast<size_t>(n));
  }

 private:
  IntSpan program_;
  std::span<const Scalar> numbers_;
  size_t at_ = 0, number_ = 0;
};

/// Inputs of the ops that are not of the kind `pointwise` and run here; 0 for others.
int64_t inputs_by_rows(OpId id) {
  switch (id) {
    case OpId::_to_dtype:
    case OpId::clone:
    case OpId::copy_:
      return 1;
    case OpId::_dropout_backward:
      return 2;
    case OpId::_where:
      return 3;
    default:
      return 0;
  }
}

void read_program(Chain& chain, IntSpan program, std::span<const Scalar> numbers) {
  Reader reader(program, numbers);
  for (int64_t n = reader.next(kMaxFused, "registers"); n > 0; --n) {
    Operand& made = chain.operands.emplace_back();
    made.dtype = static_cast<DType>(reader.next(int64_t{kNumDTypes}, "dtype"));
    made.size = item_size(made.dtype);
  }
  const auto operands = static_cast<int64_t>(chain.operands.size());
  for (int64_t n = reader.next(kMaxFused, "ops"); n > 0; --n) {
    Instruction& op = chain.instructions.emplace_back();
    op.id = static_cast<OpId>(reader.next(kNumOps, "op"));
    op.compute = static_cast<DType>(reader.next(int64_t{kNumDTypes}, "dtype"));
    op.kernel = pointwise_kernel(op.id);
    const int64_t wanted = inputs_by_rows(op.id);
    check(op.kernel || wanted > 0, "_fused_pointwise: ", op_name(op.id),
          " has no kernel for blocks");
    op.first = static_cast<int>(chain.used.size());
    const int64_t out = reader.next(operands, "operand");
    chain.used.push_back(static_cast<int>(out));
    const int64_t inputs = reader.next(kMaxOperands, "operands read");
    check(op.kernel || inputs == wanted, "_fused_pointwise: ", op_name(op.id), " of ", inputs,
          " operands");
    for (int64_t i = 0; i < inputs; ++i) {
      const int64_t in = reader.next(operands, "operand");
      Operand& read = chain.operands[static_cast<size_t>(in)];
      read.read_first |= !read.written;
      chain.used.push_back(static_cast<int>(in));
    }
    chain.operands[static_cast<size_t>(out)].written = true;
    op.count = static_cast<int>(inputs) + 1;
    op.attributes = reader.attributes(reader.next(kMaxFused, "attributes"));
    check(op.id != OpId::_dropout_backward || op.attributes.size() == 1,
          "_fused_pointwise: _dropout_backward needs its scale");
  }
}

/// An operand in memory, as a tensor of the iteration's shape.
Operand memory_operand(const Tensor& tensor, IntSpan sizes, bool output) {
  Operand made;
  made.dtype = tensor.dtype();
  made.size = tensor.itemsize();
  made.data = static_cast<char*>(tensor.data());
  made.is_number = tensor.impl()->wrapped_number;
  const size_t ndim = sizes.size(), own = static_cast<size_t>(tensor.dim());
  check(own <= ndim, "_fused_pointwise: an operand of ", tensor.sizes(), " in a chain over ",
        sizes);
  made.strides.resize(ndim);
  for (size_t d = 0; d < own; ++d) {
    const int64_t extent = tensor.sizes()[d], whole = sizes[ndim - own + d];
    check(extent == whole || (extent == 1 && !output), "_fused_pointwise: an operand of ",
          tensor.sizes(), " in a chain over ", sizes);
    made.strides[ndim - own + d] = extent == 1 ? 0 : tensor.strides()[d] * made.size;
  }
  check(!output || own == ndim, "_fused_pointwise: an output of ", tensor.sizes(),
        " of a chain over ", sizes);
  return made;
}

/// Orders dimensions as the first output lies, merges those that every operand walks evenly, and
/// finds which operands lie in that order.
void lay_out(Chain& chain, IntSpan sizes) {
  SmallVector<int, 8> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    chain.numel *= sizes[d];
    if (sizes[d] != 1) order.push_back(static_cast<int>(d));
  }
  const auto& lead = chain.operands[0].strides;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return lead[static_cast<size_t>(a)] > lead[static_cast<size_t>(b)];
  });
  const auto in_memory = [](const Operand& o) { return o.data != nullptr; };
  SmallVector<int, 8> last;  // of each merged dimension, its fastest
  for (const int d : order) {
    const auto dim = static_cast<size_t>(d);
    bool merge = !last.empty();
    for (const Operand& o : chain.operands) {
      if (!merge || !in_memory(o)) continue;
      merge = o.strides[static_cast<size_t>(last.back())] == o.strides[dim] * sizes[dim];
    }
    if (merge) {
      chain.shape.back() *= sizes[dim];
      last.back() = d;
    } else {
      chain.shape.push_back(sizes[dim]);
      last.push_back(d);
    }
  }
  for (Operand& o : chain.operands) {
    if (!in_memory(o)) continue;
    const auto whole = o.strides;
    o.strides.clear();
    for (const int d : last) o.strides.push_back(whole[static_cast<size_t>(d)]);
    bool flat = true, single = true;
    int64_t step = o.size;
    for (size_t d = o.strides.size(); d-- > 0;) {
      flat = flat && o.strides[d] == step;
      single = single && o.strides[d] == 0;
      step *= chain.shape[d];
    }
    o.place = flat ? Place::Flat : single ? Place::Single : Place::Gathered;
  }
}

/// Finds the 16-bit floats that can be floats: not those that an op reads as another 16-bit float.
void widen_operands(Chain& chain) {
  for (Operand& o : chain.operands) o.wide = is_reduced_float(o.dtype) && o.place != Place::Single;
  for (const Instruction& op : chain.instructions) {
    for (int i = 1; i < op.count; ++i) {
      Operand& o =
          chain.operands[static_cast<size_t>(chain.used[static_cast<size_t>(op.first + i)])];
      if (op.kernel && is_reduced_float(op.compute) && op.compute != o.dtype) o.wide = false;
    }
  }
  SmallVector<bool, 32> read(chain.operands.size());
  for (size_t at = chain.instructions.size(); at-- > 0;) {
    Instruction& op = chain.instructions[at];
    const auto out = static_cast<size_t>(chain.used[static_cast<size_t>(op.first)]);
    op.round = chain.operands[out].wide && read[out];
    for (int i = 1; i < op.count; ++i)
      read[static_cast<size_t>(chain.used[static_cast<size_t>(op.first + i)])] = true;
  }
}

/// Numbers in the dtype of the op that reads them.
void convert_numbers(Chain& chain) {
  chain.converted.resize(chain.used.size());
  for (const Instruction& op : chain.instructions) {
    // pow looks at the number as it was given.
    if (!op.kernel || op.id == OpId::pow || op.id == OpId::pow_) continue;
    for (int i = 1; i < op.count; ++i) {
      const auto at = static_cast<size_t>(op.first + i);
      const Operand from = chain.operands[static_cast<size_t>(chain.used[at])];
      if (from.place != Place::Single || from.dtype == op.compute) continue;
      // Kernels of 16-bit floats compute in float, and take one as it is.
      if (is_reduced_float(op.compute) && from.dtype == DType::Float32) continue;
      char* value = chain.converted[at].value;
      visit_all(op.compute, [&]<class T>() {
        T number;
        load_block<T>(&number, from.data, 0, 1, from.dtype, op.compute);
        store_block<T>(value, item_size(op.compute), &number, 1, op.compute);
      });
      Operand& made = chain.operands.emplace_back();
      made.place = Place::Single;
      made.dtype = op.compute;
      made.size = item_size(op.compute);
      made.is_number = from.is_number;
      made.data = value;
      chain.used[at] = static_cast<int>(chain.operands.size()) - 1;
    }
  }
}

void place_registers(Chain& chain) {
  int64_t bytes = 0;
  for (const Operand& o : chain.operands)
    bytes += o.place == Place::Single ? 0 : o.wide ? 4 : o.size;
  chain.block = std::clamp(kCacheBytes / std::max<int64_t>(bytes, 1) / 256 * 256, kLeast, kMost);
  if (chain.numel <= chain.block) chain.block = chain.numel;
  const auto take = [&](int64_t size) {
    const int64_t at = chain.scratch;
    // A line more: registers must not all begin in the same set of the cache.
    chain.scratch += (chain.block * size + 63) / 64 * 64 + 64;
    return at;
  };
  for (Operand& o : chain.operands) {
    if (o.place == Place::Gathered && o.wide) o.gathered = take(o.size);
    if (o.wide)
      o.offset = take(sizeof(float));
    else if (o.place == Place::Gathered || o.place == Place::Register)
      o.offset = take(o.size);
  }
}

template <class T>
void move_row(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  if (to_stride == sizeof(T) && from_stride == sizeof(T)) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else if (to_stride == sizeof(T) && from_stride == 0) {
    std::fill_n(reinterpret_cast<T*>(to), n, *reinterpret_cast<const T*>(from));
  } else {
    for (int64_t i = 0; i < n; ++i)
      *reinterpret_cast<T*>(to + i * to_stride) =
          *reinterpret_cast<const T*>(from + i * from_stride);
  }
}

/// A copy of bits, whatever they mean.
void copy_row(const TensorIterator::RowOperand& to, const TensorIterator::RowOperand& from,
              int64_t n) {
  if (to.data == from.data) return;
  switch (item_size(to.dtype)) {
    case 1:
      return move_row<uint8_t>(to.data, to.stride, from.data, from.stride, n);
    case 2:
      return move_row<uint16_t>(to.data, to.stride, from.data, from.stride, n);
    case 4:
      return move_row<uint32_t>(to.data, to.stride, from.data, from.stride, n);
    default:
      return move_row<uint64_t>(to.data, to.stride, from.data, from.stride, n);
  }
}

/// Moves elements [begin, begin + n) of the chain between an operand and its register.
template <class T>
void move_block(const Chain& chain, const Operand& operand, char* dense, int64_t begin, int64_t n,
                bool gather) {
  const size_t ndim = chain.shape.size();
  SmallVector<int64_t, 6> counter(ndim);
  int64_t rest = begin;
  char* place = operand.data;
  for (size_t d = ndim; d-- > 0;) {
    counter[d] = rest % chain.shape[d];
    rest /= chain.shape[d];
    place += counter[d] * operand.strides[d];
  }
  const size_t inner = ndim - 1;
  const int64_t stride = operand.strides[inner];
  constexpr int64_t size = sizeof(T);
  while (n > 0) {
    const int64_t m = std::min(n, chain.shape[inner] - counter[inner]);
    if (gather)
      move_row<T>(dense, size, place, stride, m);
    else
      move_row<T>(place, stride, dense, size, m);
    dense += m * size;
    n -= m;
    place -= counter[inner] * stride;
    counter[inner] = 0;
    for (size_t d = inner; d-- > 0;) {
      place += operand.strides[d];
      if (++counter[d] < chain.shape[d]) break;
      place -= chain.shape[d] * operand.strides[d];
      counter[d] = 0;
    }
  }
}

void move_operand(const Chain& chain, const Operand& operand, char* dense, int64_t begin, int64_t n,
                  bool gather) {
  switch (operand.size) {
    case 1:
      return move_block<uint8_t>(chain, operand, dense, begin, n, gather);
    case 2:
      return move_block<uint16_t>(chain, operand, dense, begin, n, gather);
    case 4:
      return move_block<uint32_t>(chain, operand, dense, begin, n, gather);
    default:
      return move_block<uint64_t>(chain, operand, dense, begin, n, gather);
  }
}

void widen(float* out, const char* in, int64_t n, DType dtype) {
  const auto* bits = reinterpret_cast<const uint16_t*>(in);
  if (dtype == DType::BFloat16)
    f32_from_bf16(out, bits, n);
  else
    f32_from_f16(out, bits, n);
}

void narrow(char* out, const float* in, int64_t n, DType dtype) {
  auto* bits = reinterpret_cast<uint16_t*>(out);
  if (dtype == DType::BFloat16)
    bf16_from_f32(bits, in, n);
  else
    f16_from_f32(bits, in, n);
}

/// The floats as their 16-bit dtype has them.
void round_block(float* values, int64_t n, DType dtype) {
  if (dtype == DType::BFloat16) {
    for (int64_t i = 0; i < n; ++i) values[i] = f32_of_bf16(bf16_of_f32(values[i]));
    return;
  }
  char bits[kBlock * 2];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    narrow(bits, values + i, m, dtype);
    widen(values + i, bits, m, dtype);
  }
}

void run_instruction(const Chain& chain, const Instruction& op, TensorIterator& it, char* memory,
                     int64_t begin, int64_t n) {
  TensorIterator::RowOperand row[kMaxOperands];
  for (int i = 0; i < op.count; ++i) {
    const Operand& o =
        chain.operands[static_cast<size_t>(chain.used[static_cast<size_t>(op.first + i)])];
    const DType dtype = o.wide ? DType::Float32 : o.dtype;
    // Other than pointwise kernels read operands as they are.
    const DType seen = i == 0 || !op.kernel ? dtype : op.compute;
    if (o.place == Place::Single)
      row[i] = {o.data, dtype, seen, 0, o.is_number};
    else if (o.place == Place::Flat && !o.wide)
      row[i] = {o.data + begin * o.size, dtype, seen, o.size, o.is_number};
    else
      row[i] = {memory + o.offset, dtype, seen, item_size(dtype), o.is_number};
  }
  it.row({row, static_cast<size_t>(op.count)}, n);
  if (op.kernel)
    op.kernel(it, op.attributes);
  else if (op.id == OpId::_where)
    where_rows(it);
  else if (op.id == OpId::_dropout_backward)
    dropout_backward_rows(it, op.attributes[0].to_double());
  else if (row[0].dtype == row[1].dtype)
    copy_row(row[0], row[1], n);
  else
    convert_rows(it);
  if (op.round) {
    const Operand& out =
        chain.operands[static_cast<size_t>(chain.used[static_cast<size_t>(op.first)])];
    round_block(reinterpret_cast<float*>(row[0].data), n, out.dtype);
  }
}

/// Brings a block of an operand that does not serve where it lies into its register, or back.
void move_in(const Chain& chain, const Operand& o, char* memory, int64_t begin, int64_t n) {
  const char* from = o.data + begin * o.size;
  if (o.place == Place::Gathered) {
    char* dense = memory + (o.wide ? o.gathered : o.offset);
    move_operand(chain, o, dense, begin, n, true);
    from = dense;
  }
  if (o.wide) widen(reinterpret_cast<float*>(memory + o.offset), from, n, o.dtype);
}
void move_out(const Chain& chain, const Operand& o, char* memory, int64_t begin, int64_t n) {
  const bool flat = o.place == Place::Flat;
  char* dense = flat ? o.data + begin * o.size : memory + (o.wide ? o.gathered : o.offset);
  if (o.wide) narrow(dense, reinterpret_cast<const float*>(memory + o.offset), n, o.dtype);
  if (!flat) move_operand(chain, o, dense, begin, n, false);
}

void run_blocks(const Chain& chain, int64_t first, int64_t last) {
  const auto moves = [](const Operand& o) {
    return o.place == Place::Gathered || (o.place == Place::Flat && o.wide);
  };
  char* memory = scratch<char>(Scratch::Registers, chain.scratch);
  TensorIterator it;
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = b * chain.block, n = std::min(chain.block, chain.numel - begin);
    for (const Operand& o : chain.operands) {
      if (moves(o) && o.read_first) move_in(chain, o, memory, begin, n);
    }
    for (const Instruction& op : chain.instructions)
      run_instruction(chain, op, it, memory, begin, n);
    for (const Operand& o : chain.operands) {
      if (moves(o) && o.written) move_out(chain, o, memory, begin, n);
    }
  }
}

void fused_pointwise(TensorSpan outputs, TensorSpan inputs, IntSpan sizes, IntSpan program,
                     std::span<const Scalar> numbers) {
  check(!outputs.empty(), "_fused_pointwise: a chain writes at least one output");
  Chain chain;
  for (const Tensor& t : outputs) chain.operands.push_back(memory_operand(t, sizes, true));
  for (const Tensor& t : inputs) chain.operands.push_back(memory_operand(t, sizes, false));
  read_program(chain, program, numbers);
  lay_out(chain, sizes);
  if (chain.numel == 0) return;
  widen_operands(chain);
  convert_numbers(chain);
  place_registers(chain);
  const int64_t blocks = (chain.numel + chain.block - 1) / chain.block;
  const int64_t work = chain.block * static_cast<int64_t>(chain.instructions.size());
  parallel_for(0, blocks, std::max<int64_t>(1, kGrainWork / std::max<int64_t>(work, 1)),
               [&](int64_t b, int64_t e) { run_blocks(chain, b, e); });
}

const RegisterCpu registered([](KernelTable& t) { t._fused_pointwise = fused_pointwise; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
