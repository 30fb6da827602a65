// TensorIterator: the one place that turns operands of any shape, stride and dtype into plain
// strided loops. It broadcasts, promotes, allocates outputs, checks overlap, orders dimensions by
// stride and merges those that can be walked as one. Backends read the result: CPU kernels call
// for_each, CUDA kernels take the strides into their launch parameters.
#pragma once

#include <cstdint>

#include "core/function_ref.h"
#include "core/tensor.h"

namespace vt {

inline constexpr int kMaxOperands = 8;

/// How the dtype in which a pointwise op computes follows from its inputs.
enum class Promote : uint8_t {
  None,    // operands keep their own dtypes
  Common,  // the promoted type of the inputs
  Float,   // as Common, but integers become the default float dtype (sin, mean, true division)
};

struct IterConfig {
  Promote promote = Promote::Common;
  /// Fixed output dtype (comparisons give bool); otherwise the common dtype.
  std::optional<DType> output_dtype = std::nullopt;
  /// The op named in errors.
  std::string_view op = "op";
  bool check_overlap = true;
  /// In-place and out= calls need the result type to be castable to the output's dtype.
  bool check_output_cast = true;
};

class TensorIterator {
 public:
  struct Operand {
    char* data;
    DType dtype;          // as stored
    DType compute_dtype;  // as the kernel sees it; differs where a cast on the fly is needed
    bool is_output;
    bool on_host;      // a number in host memory beside operands on a device
    bool is_number;    // a Python number
    int64_t* strides;  // bytes, per iterator dimension, fastest dimension first
  };

  TensorIterator() = default;
  TensorIterator(const TensorIterator&) = delete;
  TensorIterator& operator=(const TensorIterator&) = delete;

  /// Pointwise: one output per entry; an undefined output is allocated. Outputs come first.
  void build(std::span<Tensor* const> outputs, std::span<const Tensor* const> inputs,
             const IterConfig& config);
  void unary(Tensor& out, const Tensor& a, const IterConfig& config);
  void binary(Tensor& out, const Tensor& a, const Tensor& b, const IterConfig& config);
  /// An operand of a single row, `stride` bytes from element to element.
  struct RowOperand {
    char* data;
    DType dtype, compute_dtype;
    int64_t stride;
    bool is_number;
  };
  /// `n` elements of operands that are known to fit: nothing is inferred, checked or allocated.
  /// The first operand is the output.
  void row(std::span<const RowOperand> operands, int64_t n);

  int ndim() const { return ndim_; }
  /// Extents, fastest-moving dimension first.
  const int64_t* shape() const { return shape_; }
  int64_t numel() const { return numel_; }
  int num_operands() const { return num_operands_; }
  const Operand& operand(int i) const { return operands_[i]; }
  char* data(int i) const { return operands_[i].data; }
  int64_t stride(int operand, int dim) const { return operands_[operand].strides[dim]; }
  DType dtype(int i) const { return operands_[i].dtype; }
  /// A 0-d CPU tensor while the others are on a device: its value travels with the launch.
  bool on_host(int i) const { return operands_[i].on_host; }
  DType compute_dtype(int i) const { return operands_[i].compute_dtype; }
  /// The dtype the kernel computes in (that of the first input).
  DType common_dtype() const { return operands_[num_outputs_].compute_dtype; }
  Device device() const { return device_; }

  /// loop(data, strides, n): `n` steps of `strides[i]` bytes from `data[i]` for every operand.
  using Loop = FunctionRef<void(char** data, const int64_t* strides, int64_t n)>;
  /// Runs `loop` over the whole space, on all threads when it is larger than `grain`.
  void for_each(Loop loop, int64_t grain = 32768) const;
  /// Runs `loop` over the linear range [begin, end) of the space on this thread.
  void serial_for_each(Loop loop, int64_t begin, int64_t end) const;

 private:
  void add(Tensor* tensor, bool is_output);
  bool build_flat(std::span<Tensor* const> outputs, std::span<const Tensor* const> inputs);
  void compute_dtypes(std::span<Tensor* const> outputs, std::span<const Tensor* const> inputs,
                      const IterConfig& config);
  void check_devices(std::span<const Tensor* const> inputs, std::span<Tensor* const> outputs,
                     const IterConfig& config);
  void order_and_merge();

  Operand operands_[kMaxOperands];
  int64_t shape_[kMaxDims];
  int64_t strides_[kMaxOperands][kMaxDims];
  DType output_dtype_ = DType::Float32;
  int64_t numel_ = 0;
  int ndim_ = 0;
  int num_operands_ = 0;
  int num_outputs_ = 0;
  Device device_;
};

/// Throws torch's `"op" not implemented for 'Bool'`.
[[noreturn]] void dtype_not_supported(DType dtype, std::string_view op);
/// Result dtype of an op over these inputs, by torch's categories (dimensioned tensors, then 0-d
/// tensors, then Python numbers; a lower group only counts where its category is higher).
DType result_type(std::span<const Tensor* const> inputs);
/// Broadcast of two shapes. Throws naming both.
Dims broadcast_shapes(IntSpan a, IntSpan b);
Dims broadcast_shapes(std::span<const Tensor* const> inputs, std::string_view op);
/// Throws if writing `out` in place would write one place twice (an expanded tensor).
void check_no_internal_overlap(const Tensor& out);
/// Throws if `out` and `in` share memory without being the same view.
void check_no_partial_overlap(const Tensor& out, const Tensor& in);
/// The one device all of these live on; 0-d CPU tensors may accompany a device.
Device common_device(std::span<const Tensor* const> tensors, std::string_view op);

}  // namespace vt
