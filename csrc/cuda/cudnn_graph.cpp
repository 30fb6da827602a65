#include "cuda/cudnn_graph.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/tensor.h"

namespace vt::cuda::cudnn {
namespace {

// A plan that asks for more is taken only if there is none that does not.
constexpr int64_t kModestWorkspace = int64_t{1} << 30;
constexpr int64_t kAlignment = 16;

/// Whether an engine configuration keeps the limits.
bool within(const Descriptor& config, const PlanLimits& limits) {
  Descriptor engine(DescriptorType::Engine);
  RawDescriptor raw = engine.raw();
  int64_t count = 0;
  if (api().get(config.raw(), Attribute::EngineConfigEngine, ValueType::Descriptor, 1, &count,
                &raw) != 0)
    return false;
  Note notes[kNotes] = {};
  if (api().get(raw, Attribute::EngineNumericalNote, ValueType::NumericalNote, kNotes, &count,
                notes) != 0)
    return false;
  for (int64_t i = 0; i < std::min<int64_t>(count, kNotes); ++i) {
    if (notes[i] == Note::NonDeterministic && limits.deterministic) return false;
    if (notes[i] == Note::TensorCore && !limits.tensor_cores) return false;
    if (notes[i] == Note::DownConvertInputs && !limits.down_conversion) return false;
  }
  return true;
}

/// The configurations the library proposes, best first.
std::vector<Descriptor> propose(const Descriptor& graph, Heuristic mode) {
  std::vector<Descriptor> out;
  Descriptor heuristics(DescriptorType::Heuristics);
  RawDescriptor raw = graph.raw();
  if (heuristics.set(Attribute::HeuristicsGraph, ValueType::Descriptor, 1, &raw) != 0 ||
      heuristics.set(Attribute::HeuristicsMode, ValueType::HeuristicMode, 1, &mode) != 0 ||
      heuristics.finalize() != 0)
    return out;
  int64_t count = 0;
  if (api().get(heuristics.raw(), Attribute::HeuristicsResults, ValueType::Descriptor, 0, &count,
                nullptr) != 0)
    return out;
  std::vector<RawDescriptor> raws;
  for (int64_t i = 0; i < count; ++i) {
    out.emplace_back(DescriptorType::EngineConfig);
    raws.push_back(out.back().raw());
  }
  if (api().get(heuristics.raw(), Attribute::HeuristicsResults, ValueType::Descriptor, count,
                &count, raws.data()) != 0)
    count = 0;
  out.resize(static_cast<size_t>(std::min<int64_t>(count, static_cast<int64_t>(out.size()))));
  return out;
}

}  // namespace

DataType data_type(DType dtype) {
  switch (dtype) {
    case DType::Float16:
      return DataType::Half;
    case DType::BFloat16:
      return DataType::BFloat16;
    case DType::Float64:
      return DataType::Double;
    default:
      return DataType::Float;
  }
}

std::atomic<int64_t> plan_runs{0};

void Plan::run(Handle handle, std::span<void* const> operands, void* workspace_bytes) const {
  constexpr size_t kMost = 24;
  void* pointers[kMost];
  const size_t count = ids.size();
  check(count == operands.size() + constants.size() && count <= kMost, "cuDNN: a plan of ",
        count - constants.size(), " operands was given ", operands.size());
  std::ranges::copy(operands, pointers);
  for (size_t i = 0; i < constants.size(); ++i)
    pointers[operands.size() + i] = const_cast<float*>(&constants[i]);
  Descriptor pack(DescriptorType::VariantPack);
  const auto n = static_cast<int64_t>(count);
  check_status(pack.set(Attribute::PackIds, ValueType::Int64, n, ids.data()), "naming operands");
  check_status(pack.set(Attribute::PackPointers, ValueType::Pointer, n, pointers),
               "passing operands");
  check_status(pack.set(Attribute::PackWorkspace, ValueType::Pointer, 1, &workspace_bytes),
               "passing a workspace");
  check_status(pack.finalize(), "passing operands");
  check_status(api().execute(handle, plan.raw(), pack.raw()), "running a plan");
  plan_runs.fetch_add(1, std::memory_order_relaxed);
}

bool Graph::accept(Status status, std::string_view what) {
  if (status == 0) return true;
  if (ok_) {
    char message[512] = "";
    api().last_error(message, sizeof message);
    refusal_ = str(api().error_string(status), " while ", what, message[0] ? ": " : "", message);
  }
  ok_ = false;
  return false;
}

void Graph::attribute(Descriptor& d, Attribute name, ValueType type, int64_t count,
                      const void* values) {
  if (ok_)
    accept(d.set(name, type, count, values), str("setting attribute ", static_cast<int>(name)));
}
void Graph::reference(Descriptor& d, Attribute name, const Descriptor& other) {
  RawDescriptor raw = other.raw();
  attribute(d, name, ValueType::Descriptor, 1, &raw);
}
void Graph::tensor(Descriptor& d, Attribute name, Id id) {
  if (id != kNone) reference(d, name, tensors_[static_cast<size_t>(id)]);
}
bool Graph::finalize(Descriptor& d) {
  return ok_ && accept(d.finalize(), "finalizing a descriptor");
}

void Graph::operation(Descriptor d) {
  finalize(d);
  operations_.push_back(std::move(d));
}

Graph::Id Graph::add_tensor(DataType type, IntSpan sizes, IntSpan strides, bool is_virtual,
                            bool by_value) {
  const auto rank = static_cast<int64_t>(sizes.size());
  const auto id = static_cast<int64_t>(tensors_.size()) + 1;
  Descriptor d(DescriptorType::Tensor);
  attribute(d, Attribute::TensorType, ValueType::DataType, 1, &type);
  attribute(d, Attribute::TensorSizes, ValueType::Int64, rank, sizes.data());
  attribute(d, Attribute::TensorStrides, ValueType::Int64, rank, strides.data());
  attribute(d, Attribute::TensorId, ValueType::Int64, 1, &id);
  attribute(d, Attribute::TensorAlignment, ValueType::Int64, 1, &kAlignment);
  if (is_virtual) attribute(d, Attribute::TensorIsVirtual, ValueType::Boolean, 1, &is_virtual);
  if (by_value) attribute(d, Attribute::TensorIsByValue, ValueType::Boolean, 1, &by_value);
  finalize(d);
  tensors_.push_back(std::move(d));
  return static_cast<Id>(id - 1);
}

Graph::Id Graph::operand(DataType type, IntSpan sizes, IntSpan strides) {
  const Id id = add_tensor(type, sizes, strides, false, false);
  operand_ids_.push_back(id + 1);
  return id;
}
Graph::Id Graph::constant(float value, size_t rank) {
  const Dims ones(rank, 1);
  const Id id = add_tensor(DataType::Float, ones, ones, false, true);
  constant_ids_.push_back(id + 1);
  constants_.push_back(value);
  return id;
}
Graph::Id Graph::value(DataType type, IntSpan sizes, IntSpan strides) {
  return add_tensor(type, sizes, strides.empty() ? IntSpan(contiguous_strides(sizes)) : strides,
                    true, false);
}

void Graph::pointwise_as(DataType precision, Pointwise mode, Id y, Id x, Id b, Id t, int64_t axis) {
  Descriptor settings(DescriptorType::Pointwise);
  attribute(settings, Attribute::PointwiseMode, ValueType::PointwiseMode, 1, &mode);
  attribute(settings, Attribute::PointwisePrecision, ValueType::DataType, 1, &precision);
  if (axis >= 0) attribute(settings, Attribute::PointwiseAxis, ValueType::Int64, 1, &axis);
  finalize(settings);
  Descriptor d(DescriptorType::OperationPointwise);
  reference(d, Attribute::PointwiseDescriptor, settings);
  tensor(d, Attribute::PointwiseX, x);
  tensor(d, Attribute::PointwiseB, b);
  tensor(d, Attribute::PointwiseT, t);
  tensor(d, Attribute::PointwiseY, y);
  operation(std::move(d));
  parts_.push_back(std::move(settings));
}
void Graph::pointwise(Pointwise mode, Id y, Id x, Id b, Id t) {
  pointwise_as(compute_, mode, y, x, b, t, -1);
}
void Graph::index(Id y, Id x, int64_t axis) {
  pointwise_as(compute_, Pointwise::Index, y, x, kNone, kNone, axis);
}
void Graph::compare(Pointwise mode, Id y, Id x, Id b) {
  pointwise_as(DataType::Boolean, mode, y, x, b, kNone, -1);
}

void Graph::matmul(Id c, Id a, Id b) {
  Descriptor settings(DescriptorType::Matmul);
  attribute(settings, Attribute::MatmulType, ValueType::DataType, 1, &compute_);
  finalize(settings);
  Descriptor d(DescriptorType::OperationMatmul);
  reference(d, Attribute::MatmulDescriptor, settings);
  tensor(d, Attribute::MatmulA, a);
  tensor(d, Attribute::MatmulB, b);
  tensor(d, Attribute::MatmulC, c);
  operation(std::move(d));
  parts_.push_back(std::move(settings));
}

void Graph::reduce(Reduction mode, Id y, Id x) {
  Descriptor settings(DescriptorType::Reduction);
  attribute(settings, Attribute::ReductionOperator, ValueType::ReductionOperator, 1, &mode);
  attribute(settings, Attribute::ReductionType, ValueType::DataType, 1, &compute_);
  finalize(settings);
  Descriptor d(DescriptorType::OperationReduction);
  reference(d, Attribute::ReductionDescriptor, settings);
  tensor(d, Attribute::ReductionX, x);
  tensor(d, Attribute::ReductionY, y);
  operation(std::move(d));
  parts_.push_back(std::move(settings));
}

void Graph::reshape(Id y, Id x) {
  Descriptor d(DescriptorType::OperationReshape);
  tensor(d, Attribute::ReshapeX, x);
  tensor(d, Attribute::ReshapeY, y);
  operation(std::move(d));
}

void Graph::convolution(DescriptorType kind, Id x, Id w, Id y, const Window& window) {
  Descriptor settings(DescriptorType::Convolution);
  const auto rank = static_cast<int64_t>(window.stride.size());
  attribute(settings, Attribute::ConvolutionType, ValueType::DataType, 1, &compute_);
  attribute(settings, Attribute::ConvolutionMode, ValueType::ConvolutionMode, 1,
            &kCrossCorrelation);
  attribute(settings, Attribute::ConvolutionRank, ValueType::Int64, 1, &rank);
  attribute(settings, Attribute::ConvolutionStrides, ValueType::Int64, rank, window.stride.data());
  attribute(settings, Attribute::ConvolutionDilations, ValueType::Int64, rank,
            window.dilation.data());
  for (const Attribute side :
       {Attribute::ConvolutionPaddingBefore, Attribute::ConvolutionPaddingAfter})
    attribute(settings, side, ValueType::Int64, rank, window.padding.data());
  finalize(settings);

  struct Names {
    Attribute alpha, beta, settings, x, w, y;
  };
  using enum Attribute;
  const Names names =
      kind == DescriptorType::ConvolutionForward
          ? Names{ForwardAlpha, ForwardBeta, ForwardConvolution, ForwardX, ForwardW, ForwardY}
      : kind == DescriptorType::ConvolutionBackwardData
          ? Names{DataAlpha, DataBeta, DataConvolution, DataDx, DataW, DataDy}
          : Names{FilterAlpha, FilterBeta, FilterConvolution, FilterX, FilterDw, FilterDy};
  Descriptor d(kind);
  reference(d, names.settings, settings);
  tensor(d, names.x, x);
  tensor(d, names.w, w);
  tensor(d, names.y, y);
  const double one = 1, zero = 0;
  const float one32 = 1, zero32 = 0;
  const bool wide = compute_ == DataType::Double;
  const ValueType type = wide ? ValueType::Double : ValueType::Float;
  attribute(d, names.alpha, type, 1, wide ? static_cast<const void*>(&one) : &one32);
  attribute(d, names.beta, type, 1, wide ? static_cast<const void*>(&zero) : &zero32);
  operation(std::move(d));
  parts_.push_back(std::move(settings));
}

std::vector<Plan> Graph::plans(Handle handle, const PlanLimits& limits) {
  std::vector<Plan> out, large;
  Descriptor graph(DescriptorType::OperationGraph);
  std::vector<RawDescriptor> raws;
  for (const Descriptor& d : operations_) raws.push_back(d.raw());
  attribute(graph, Attribute::GraphHandle, ValueType::Handle, 1, &handle);
  attribute(graph, Attribute::GraphOperations, ValueType::Descriptor,
            static_cast<int64_t>(raws.size()), raws.data());
  if (!finalize(graph)) return out;
  for (const Heuristic mode : {Heuristic::A, Heuristic::Fallback}) {
    if (!out.empty()) break;
    const std::vector<Descriptor> configs = propose(graph, mode);
    if (configs.empty() && refusal_.empty()) refusal_ = "no engine was proposed";
    for (const Descriptor& config : configs) {
      if (out.size() >= limits.wanted) break;
      if (!within(config, limits)) {
        if (refusal_.empty()) refusal_ = "no engine keeps the limits";
        continue;
      }
      Plan made{Descriptor(DescriptorType::ExecutionPlan), 0, operand_ids_, constants_};
      made.ids.insert(made.ids.end(), constant_ids_.begin(), constant_ids_.end());
      RawDescriptor raw = config.raw();
      int64_t count = 0;
      Status status = made.plan.set(Attribute::PlanHandle, ValueType::Handle, 1, &handle);
      if (status == 0)
        status = made.plan.set(Attribute::PlanEngineConfig, ValueType::Descriptor, 1, &raw);
      if (status == 0) status = made.plan.finalize();
      if (status == 0) {
        status = api().get(made.plan.raw(), Attribute::PlanWorkspace, ValueType::Int64, 1, &count,
                           &made.workspace);
      }
      if (status != 0) {
        accept(status, "planning");
        ok_ = true;  // another engine may do
        continue;
      }
      (made.workspace <= kModestWorkspace ? out : large).push_back(std::move(made));
    }
  }
  if (out.empty() && !large.empty()) {
    const auto least = std::ranges::min_element(large, {}, &Plan::workspace);
    out.push_back(std::move(*least));
  }
  return out;
}

bool PlanKey::operator==(const PlanKey& other) const {
  return count == other.count &&
         std::memcmp(words.data(), other.words.data(), static_cast<size_t>(count) * 8) == 0;
}
size_t PlanKeyHash::operator()(const PlanKey& key) const {
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (int i = 0; i < key.count; ++i) {
    h = (h ^ static_cast<uint64_t>(key.words[static_cast<size_t>(i)])) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
  }
  return h;
}

}  // namespace vt::cuda::cudnn
