// Computations described to cuDNN as graphs of operations, and the plans it makes of them. Plans
// are kept by shape, so a repeated computation costs one hash lookup before the library's launch.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/dtype.h"
#include "core/small_vector.h"
#include "cuda/cudnn_api.h"
#include "cuda/stream.h"

namespace vt::cuda::cudnn {

DataType data_type(DType dtype);

/// What the library may do for a plan.
struct PlanLimits {
  bool deterministic = false;
  bool tensor_cores = true;
  bool down_conversion = true;  // operands may be rounded to a narrower format
  size_t wanted = 1;            // the most plans to return, best first
};

/// A computation ready to run: an execution plan, the ids of its operands, and its constants.
struct Plan {
  Descriptor plan;
  int64_t workspace = 0;         // bytes
  std::vector<int64_t> ids;      // operands in the order they were described, then constants
  std::vector<float> constants;  // read by the library at each run

  /// Runs on the handle's stream. `operands` are device pointers in the order of description.
  void run(Handle handle, std::span<void* const> operands, void* workspace_bytes) const;
};

extern std::atomic<int64_t> plan_runs;

/// A graph under construction. A step that the library refuses makes the whole graph unusable;
/// plans() then returns none and refusal() says why.
class Graph {
 public:
  using Id = int;
  static constexpr Id kNone = -1;

  /// `type` is that of values between operations and of arithmetic: float, or double.
  explicit Graph(DataType type = DataType::Float) : compute_(type) {}

  /// A tensor in device memory, 16-byte aligned.
  Id operand(DataType type, IntSpan sizes, IntSpan strides);
  /// A number, of the given rank for broadcasting.
  Id constant(float value, size_t rank);
  /// A value between operations, dense.
  Id value(DataType type, IntSpan sizes, IntSpan strides = {});

  void pointwise(Pointwise mode, Id y, Id x, Id b = kNone, Id t = kNone);
  void index(Id y, Id x, int64_t axis);
  void compare(Pointwise mode, Id y, Id x, Id b);
  void matmul(Id c, Id a, Id b);
  void reduce(Reduction mode, Id y, Id x);
  void reshape(Id y, Id x);
  struct Window {
    IntSpan stride, padding, dilation;
  };
  void convolution(DescriptorType kind, Id x, Id w, Id y, const Window& window);

  std::vector<Plan> plans(Handle handle, const PlanLimits& limits);
  const std::string& refusal() const { return refusal_; }

 private:
  Id add_tensor(DataType type, IntSpan sizes, IntSpan strides, bool is_virtual, bool by_value);
  void attribute(Descriptor& d, Attribute name, ValueType type, int64_t count, const void* values);
  void reference(Descriptor& d, Attribute name, const Descriptor& other);
  void tensor(Descriptor& d, Attribute name, Id id);
  bool finalize(Descriptor& d);
  void operation(Descriptor d);
  void pointwise_as(DataType precision, Pointwise mode, Id y, Id x, Id b, Id t, int64_t axis);
  bool accept(Status status, std::string_view what);

  DataType compute_;
  std::vector<Descriptor> tensors_;
  std::vector<Descriptor> operations_;
  std::vector<Descriptor> parts_;  // what operations refer to
  std::vector<int64_t> operand_ids_, constant_ids_;
  std::vector<float> constants_;
  std::string refusal_;
  bool ok_ = true;
};

/// What a plan depends on.
struct PlanKey {
  static constexpr int kWords = 44;
  std::array<int64_t, kWords> words{};
  int count = 0;
  void add(int64_t word) { words[static_cast<size_t>(count++)] = word; }
  void add(IntSpan values) {
    for (const int64_t v : values) add(v);
  }
  bool operator==(const PlanKey& other) const;
};
struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const;
};

/// The plans of one computation: none (the library has none), one, or several still to be measured.
using Plans = std::vector<Plan>;

/// A handle of one device with the plans made for it. A thread takes one at its first use and gives
/// it back when it ends, for the next thread to use: no lock is taken in between, and nothing is
/// destroyed while the process lives.
class Context {
 public:
  explicit Context(int device);
  /// The calling thread's context of the stream's device (current), its handle on the stream.
  static Context& of(Stream stream);
  static Context& of_device(int device);

  Handle handle() const { return handle_; }
  /// Looks up the plans of `key`; `make` describes them if they are not known. Above a number of
  /// shapes no new ones are planned: null.
  template <class Make>
  Plans* find(const PlanKey& key, Make&& make) {
    if (const auto found = plans_.find(key); found != plans_.end()) [[likely]]
      return &found->second;
    if (plans_.size() >= kMaxPlans) return nullptr;
    return &plans_.emplace(key, make(handle_)).first->second;
  }
  /// The same with at most `most` shapes of a family: a plan can take long to make, and a loop may
  /// never see a shape again.
  template <class Make>
  Plans* find(const PlanKey& key, const PlanKey& family, int most, Make&& make) {
    if (const auto found = plans_.find(key); found != plans_.end()) [[likely]]
      return &found->second;
    int& members = families_[family];
    if (members >= most) return nullptr;
    ++members;
    return find(key, make);
  }

 private:
  static constexpr size_t kMaxPlans = 2048;
  Handle handle_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::unordered_map<PlanKey, Plans, PlanKeyHash> plans_;
  std::unordered_map<PlanKey, int, PlanKeyHash> families_;
};

/// Makes plans of a graph and notes the refusal if there are none.
Plans make_plans(Graph& graph, Handle handle, const PlanLimits& limits);

}  // namespace vt::cuda::cudnn
