#include "cuda/chain.h"

#include <algorithm>

#include "core/error.h"

namespace vt::cuda {
namespace {

using Walk = ChainOperand::Walk;

constexpr int64_t kMost = 1024;     // operands, and ops
constexpr int64_t kInFlight = 32;   // bytes that a thread loads at least
constexpr int kMostPerThread = 16;  // elements

/// Reads the program, checking what it refers to.
class Reader {
 public:
  Reader(IntSpan program, std::span<const Scalar> numbers) : program_(program), numbers_(numbers) {}
  int64_t next(int64_t limit, const char* what) {
    check(at_ < program_.size(), "_fused_pointwise: the program ends early");
    const int64_t value = program_[at_++];
    check(value >= 0 && value < limit, "_fused_pointwise: ", what, " ", value, " of ", limit);
    return value;
  }
  std::span<const Scalar> attributes(int64_t n) {
    const auto count = static_cast<size_t>(n);
    check(number_ + count <= numbers_.size(), "_fused_pointwise: too few numbers for the program");
    number_ += count;
    return numbers_.subspan(number_ - count, count);
  }

 private:
  IntSpan program_;
  std::span<const Scalar> numbers_;
  size_t at_ = 0, number_ = 0;
};

/// An operand in memory, as a tensor of the iteration's shape.
ChainOperand memory_operand(const Tensor& tensor, IntSpan sizes, bool output) {
  ChainOperand made;
  made.dtype = tensor.dtype();
  made.size = tensor.itemsize();
  const size_t ndim = sizes.size(), own = static_cast<size_t>(tensor.dim());
  check(own <= ndim && (!output || own == ndim), "_fused_pointwise: an operand of ", tensor.sizes(),
        " in a chain over ", sizes);
  if (tensor.device().is_cpu()) {
    check(!output && tensor.numel() == 1, "_fused_pointwise: a tensor of the host that is ",
          tensor.sizes(), " in a chain of a device");
    made.walk = Walk::Number;
    made.number = load_scalar(tensor.data(), tensor.dtype());
    return made;
  }
  made.walk = Walk::Strided;
  made.data = static_cast<char*>(tensor.data());
  made.strides.resize(ndim);
  for (size_t d = 0; d < own; ++d) {
    const int64_t extent = tensor.sizes()[d], whole = sizes[ndim - own + d];
    check(extent == whole || (extent == 1 && !output), "_fused_pointwise: an operand of ",
          tensor.sizes(), " in a chain over ", sizes);
    made.strides[ndim - own + d] = extent == 1 ? 0 : tensor.strides()[d] * made.size;
  }
  return made;
}

}  // namespace

Chain::Chain(TensorSpan results, TensorSpan tensors, IntSpan sizes, IntSpan program,
             std::span<const Scalar> numbers) {
  check(!results.empty(), "_fused_pointwise: a chain writes at least one output");
  device = results[0].device();
  for (const Tensor& t : results) operands.push_back(memory_operand(t, sizes, true));
  for (const Tensor& t : tensors) operands.push_back(memory_operand(t, sizes, false));
  int place = 0;
  for (ChainOperand& o : operands) {
    if (o.walk != Walk::Number) o.place = place++;
  }
  check(place <= kChainOperands, "_fused_pointwise: ", place, " tensors, of at most ",
        kChainOperands);
  read_program(program, numbers);
  lay_out(sizes);
  choose_width();
}

void Chain::read_program(IntSpan program, std::span<const Scalar> numbers) {
  Reader reader(program, numbers);
  for (int64_t n = reader.next(kMost, "registers"); n > 0; --n) {
    ChainOperand& made = operands.emplace_back();
    made.dtype = static_cast<DType>(reader.next(int64_t{kNumDTypes}, "dtype"));
    made.size = item_size(made.dtype);
  }
  const auto count = static_cast<int64_t>(operands.size());
  for (int64_t n = reader.next(kMost, "ops"); n > 0; --n) {
    ChainStep& step = steps.emplace_back();
    step.id = static_cast<OpId>(reader.next(kNumOps, "op"));
    step.compute = static_cast<DType>(reader.next(int64_t{kNumDTypes}, "dtype"));
    step.out = static_cast<int>(reader.next(count, "operand"));
    for (int64_t i = reader.next(kMost, "operands read"); i > 0; --i) {
      const auto in = static_cast<int>(reader.next(count, "operand"));
      ChainOperand& read = operands[static_cast<size_t>(in)];
      check(read.written || read.walk != Walk::Register,
            "_fused_pointwise: a register is read before it is written");
      read.read_first |= !read.written;
      step.inputs.push_back(in);
    }
    ChainOperand& out = operands[static_cast<size_t>(step.out)];
    check(out.walk != Walk::Number, "_fused_pointwise: a number of the host is written");
    out.written = true;
    step.attributes = reader.attributes(reader.next(kMost, "attributes"));
  }
}

/// Orders dimensions as the first output lies and merges those that every operand walks evenly.
void Chain::lay_out(IntSpan sizes) {
  SmallVector<int, 8> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    numel *= sizes[d];
    if (sizes[d] != 1) order.push_back(static_cast<int>(d));
  }
  const auto& lead = operands[0].strides;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return lead[static_cast<size_t>(a)] > lead[static_cast<size_t>(b)];
  });
  SmallVector<int, 8> last;  // of each merged dimension, its fastest
  for (const int d : order) {
    const auto dim = static_cast<size_t>(d);
    bool merge = !last.empty();
    for (const ChainOperand& o : operands) {
      if (!merge || o.place < 0) continue;
      merge = o.strides[static_cast<size_t>(last.back())] == o.strides[dim] * sizes[dim];
    }
    if (merge) {
      shape.back() *= sizes[dim];
      last.back() = d;
    } else {
      shape.push_back(sizes[dim]);
      last.push_back(d);
    }
  }
  for (ChainOperand& o : operands) {
    if (o.place < 0) continue;
    const auto whole = o.strides;
    o.strides.clear();
    for (const int d : last) o.strides.push_back(whole[static_cast<size_t>(d)]);
    bool flat = true, single = true;
    int64_t step = o.size;
    for (size_t d = o.strides.size(); d-- > 0;) {
      flat = flat && o.strides[d] == step;
      single = single && o.strides[d] == 0;
      step *= shape[d];
    }
    o.walk = flat ? Walk::Flat : single ? Walk::Single : Walk::Strided;
    rows |= o.walk == Walk::Strided;
  }
}

/// Whether all operands can be walked by accesses of so many elements.
bool Chain::fits(int64_t elements) const {
  if (rows && shape.back() % elements != 0) return false;
  return std::all_of(operands.begin(), operands.end(), [&](const ChainOperand& o) {
    if (o.place < 0 || o.walk == Walk::Single) return true;
    const int64_t access = o.size * elements;
    if (rows && o.walk == Walk::Strided) {
      if (o.strides.back() == 0) return true;
      if (o.strides.back() != o.size) return false;
      for (size_t d = 0; d + 1 < o.strides.size(); ++d) {
        if (o.strides[d] % access != 0) return false;
      }
    }
    return reinterpret_cast<intptr_t>(o.data) % access == 0;
  });
}

void Chain::choose_width() {
  int64_t widest = 1, loaded = 0;
  for (const ChainOperand& o : operands) {
    if (o.place < 0 || o.walk == Walk::Single) continue;
    widest = std::max(widest, o.size);
    loaded += o.read_first ? o.size : 0;
  }
  width = static_cast<int>(std::min<int64_t>(8, 16 / widest));
  while (width > 1 && !fits(width)) width /= 2;
  for (ChainOperand& o : operands) {
    if (o.walk == Walk::Strided && width > 1)
      o.walk = o.strides.back() == 0 ? Walk::Column : Walk::Row;
  }
  while (unroll < 4 && unroll * 2 * width <= kMostPerThread && unroll * width * loaded < kInFlight)
    unroll *= 2;
}

}  // namespace vt::cuda
