#include "cuda/cublaslt_plan.h"

#include <library_types.h>

#include <algorithm>
#include <array>
#include <optional>

#include "core/kernel_switches.h"
#include "cuda/allocator.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/kernel_log.h"

namespace vt::cuda::cublaslt {
namespace {

// As large as Hopper's algorithms ask for.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

/// The workspace of one product, given back once the product is issued: the stream's later work may
/// use the memory. A graph's comes from the graph's pool, as all that is allocated for it.
class Workspace {
 public:
  Workspace(Stream stream, size_t bytes)
      : memory_(device_allocator(stream.device).allocate(bytes, stream.handle)) {}
  ~Workspace() {
    if (memory_.release) memory_.release(memory_.context, memory_.data, memory_.nbytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return memory_.data; }

 private:
  Allocation memory_;
};

/// Key::float8.
int32_t pack(const Float8Operands& f) {
  return static_cast<int32_t>(f.b) | static_cast<int32_t>(f.c) << 8 |
         (f.fast_accumulate ? 1 << 16 : 0) | (f.scale_a ? 1 << 17 : 0) | (f.scale_b ? 1 << 18 : 0);
}

int cuda_type(DType dtype) {
  switch (dtype) {
    case DType::Float16:
      return CUDA_R_16F;
    case DType::BFloat16:
      return CUDA_R_16BF;
    case DType::Float64:
      return CUDA_R_64F;
    case DType::Int8:
      return CUDA_R_8I;
    case DType::Float8_e4m3fn:
      return CUDA_R_8F_E4M3;
    case DType::Float8_e5m2:
      return CUDA_R_8F_E5M2;
    default:
      return CUDA_R_32F;
  }
}

void make_layout(Description& layout, int type, uint64_t rows, uint64_t columns, int64_t ld,
                 int64_t batch, int64_t step) {
  check_status(api().layout_create(&layout, type, rows, columns, ld), "describing a matrix");
  if (batch != 1) {
    const auto count = static_cast<int32_t>(batch);
    check_status(api().layout_set(layout, kLayoutBatchCount, &count, sizeof count),
                 "describing a batch");
    check_status(api().layout_set(layout, kLayoutBatchStep, &step, sizeof step),
                 "describing a batch");
  }
}

int32_t alignment_of(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 256;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return static_cast<int32_t>(bits & (~bits + 1));
}

constexpr int kMostAnswers = 16;

// What an algorithm asks for that only wants a counter of tiles.
constexpr size_t kCounterBytes = 16;
bool wants_counter(size_t workspace) { return workspace > 0 && workspace <= kCounterBytes; }

/// Up to `wanted` of the library's answers that need no more than `workspace` bytes, best first.
std::vector<Heuristic> propose(const Plan& plan, const Key& key, uint64_t workspace, int wanted,
                               std::optional<uint32_t> reductions = std::nullopt) {
  struct Preference {
    Description made = nullptr;
    ~Preference() {
      if (made) api().preference_destroy(made);
    }
  } preference;
  check_status(api().preference_create(&preference.made), "creating a preference");
  const auto prefer = [&](int attribute, const auto& value) {
    check_status(api().preference_set(preference.made, attribute, &value, sizeof value),
                 "setting a preference");
  };
  prefer(kPreferWorkspace, workspace);
  const auto alignment = static_cast<uint32_t>(key.alignment);
  for (int operand = 0; operand < 4; ++operand) prefer(kPreferAlignmentA + operand, alignment);
  if (reductions) prefer(kPreferReduction, *reductions);
  std::array<Heuristic, kMostAnswers> results{};
  int found = 0;
  const Status status = api().heuristic(handle_of(key.device), plan.op, plan.b, plan.a, plan.c,
                                        plan.c, preference.made, wanted, results.data(), &found);
  std::vector<Heuristic> answers;
  for (int i = 0; status == 0 && i < std::min(found, wanted); ++i) {
    const Heuristic& r = results[static_cast<size_t>(i)];
    if (r.state == 0) answers.push_back(r);
  }
  return answers;
}

void tell(const Key& key, std::string_view what, const Answer* answer) {
  std::string line = str("vibetensor: cuBLASLt ", vt::cuda::describe(signature_of(key)), ": ");
  line += what;
  AlgorithmConfiguration configuration;
  if (answer && configuration_of(answer->algorithm, configuration))
    line += str(": ", vt::cuda::describe(configuration));
  log_kernel(line);
}

}  // namespace

Key key_of(const GemmProblem& p, int device) {
  const bool use_tf32 = p.dtype == DType::Float32 && kernel_switch(KernelSwitch::MatmulTf32);
  return {p.batch,
          p.m,
          p.n,
          p.k,
          p.a.ld,
          p.b.ld,
          p.ldc,
          p.a.step,
          p.b.step,
          p.step_c,
          static_cast<int32_t>(p.dtype),
          device,
          (p.a.transposed ? kTransposeA : 0) | (p.b.transposed ? kTransposeB : 0) |
              (p.bias ? kBias : 0) | (use_tf32 ? kTf32 : 0) | (p.beta != 0 ? kAccumulate : 0),
          alignment_of({p.a.data, p.b.data, p.c, p.bias ? p.bias : p.c, p.aux ? p.aux : p.c}),
          static_cast<int32_t>(p.epilogue),
          is_float8(p.dtype) ? pack(p.float8) : 0};
}

bool may_have_rows(const Key& key) {
  const auto dtype = static_cast<DType>(key.dtype);
  return is_floating(dtype) && !is_float8(dtype);
}

ProductSignature signature_of(const Key& key) {
  return {static_cast<DType>(key.dtype), key.flags, key.epilogue, key.batch, key.m, key.n, key.k};
}

Plan::~Plan() {
  for (const Description layout : {a, b, c}) {
    if (layout) api().layout_destroy(layout);
  }
  if (op) api().desc_destroy(op);
}

void describe(Plan& plan, const Key& key, const Float8Operands& float8) {
  const auto dtype = static_cast<DType>(key.dtype);
  const int type = cuda_type(dtype);
  const bool f64 = dtype == DType::Float64, int8 = dtype == DType::Int8;
  const int compute = f64                 ? kCompute64F
                      : int8              ? kCompute32I
                      : key.flags & kTf32 ? kCompute32FTf32
                                          : kCompute32F;
  const int scale = f64 ? CUDA_R_64F : int8 ? CUDA_R_32I : CUDA_R_32F;
  check_status(api().desc_create(&plan.op, compute, scale), "describing a product");
  // The library is column-major: it computes c' = b' a', where ' reads a row-major matrix as the
  // transposed column-major one it is.
  const int32_t first = (key.flags & kTransposeB) != 0, second = (key.flags & kTransposeA) != 0;
  check_status(api().desc_set(plan.op, kDescTransposeA, &first, sizeof first), "describing b");
  check_status(api().desc_set(plan.op, kDescTransposeB, &second, sizeof second), "describing a");
  const auto kind = static_cast<GemmEpilogue>(key.epilogue);
  uint32_t epilogue = 0;
  if (kind == GemmEpilogue::Relu) epilogue = kEpilogueRelu;
  if (kind == GemmEpilogue::GeluTanh) epilogue = kEpilogueGeluAux;
  if (kind == GemmEpilogue::GeluTanhBackward) epilogue = kEpilogueDGelu;
  if (key.flags & kBias) epilogue |= kEpilogueBias;
  if (epilogue == 0) epilogue = kEpilogueDefault;
  check_status(api().desc_set(plan.op, kDescEpilogue, &epilogue, sizeof epilogue),
               "describing an epilogue");
  if (kind == GemmEpilogue::GeluTanh || kind == GemmEpilogue::GeluTanhBackward) {
    check_status(api().desc_set(plan.op, kDescAuxStep, &key.ldc, sizeof key.ldc),
                 "describing an epilogue");
  }
  const auto m = static_cast<uint64_t>(key.m), n = static_cast<uint64_t>(key.n),
             k = static_cast<uint64_t>(key.k);
  const bool narrow = is_float8(dtype);
  const int type_b = narrow ? cuda_type(float8.b) : type;
  if (narrow) {
    const int8_t fast = float8.fast_accumulate;
    check_status(api().desc_set(plan.op, kDescFastAccumulate, &fast, sizeof fast),
                 "describing the sums");
    set_scales(plan, float8);
  }
  make_layout(plan.b, type_b, first ? k : n, first ? n : k, key.ldb, key.batch, key.step_b);
  make_layout(plan.a, type, second ? m : k, second ? k : m, key.lda, key.batch, key.step_a);
  const int type_c = narrow ? cuda_type(float8.c) : int8 ? CUDA_R_32I : type;
  make_layout(plan.c, type_c, n, m, key.ldc, key.batch, key.step_c);
}

/// The library's a is our b.
void set_scales(const Plan& plan, const Float8Operands& f) {
  if (f.scale_b)
    check_status(api().desc_set(plan.op, kDescScaleA, &f.scale_b, sizeof f.scale_b),
                 "setting a scale");
  if (f.scale_a)
    check_status(api().desc_set(plan.op, kDescScaleB, &f.scale_a, sizeof f.scale_a),
                 "setting a scale");
}

bool configuration_of(const Algorithm& algorithm, AlgorithmConfiguration& c) {
  const auto get = [&](int attribute, auto& value) {
    size_t written = 0;
    return api().config_get(&algorithm, attribute, &value, sizeof value, &written) == 0 &&
           written == sizeof value;
  };
  return get(kConfigId, c.id) && get(kConfigTile, c.tile) && get(kConfigSplitK, c.split_k) &&
         get(kConfigReduction, c.reduction) && get(kConfigSwizzle, c.swizzle) &&
         get(kConfigCustom, c.custom) && get(kConfigStages, c.stages) &&
         get(kConfigInner, c.inner) && get(kConfigCluster, c.cluster);
}

bool first_answer(const Plan& plan, const Key& key, Answer& answer) {
  std::vector<Heuristic> found = propose(plan, key, kWorkspaceBytes, 1);
  if (found.empty()) return false;
  // Persistent kernels may take their tiles from a counter, which a memset before each launch has
  // to clear: 2 us in a stream, 4 us in a graph. Without memory for it they divide the tiles
  // beforehand, which has not been slower for any product that was measured.
  if (wants_counter(found[0].workspace)) {
    const std::vector<Heuristic> divided = propose(plan, key, 0, 1);
    if (!divided.empty()) found = divided;
  }
  answer = {found[0].algorithm, found[0].workspace, {}};
  return true;
}

std::vector<Answer> answers_of(const Plan& plan, const Key& key) {
  // Sums of parts stay in the type that sums are made in, and are rounded once.
  const bool wide = key.dtype == static_cast<int32_t>(DType::Float32) ||
                    key.dtype == static_cast<int32_t>(DType::Float64);
  const std::optional<uint32_t> reductions =
      wide ? std::nullopt : std::optional<uint32_t>(kReduceInComputeType);
  std::vector<Answer> answers;
  for (const size_t workspace : {kWorkspaceBytes, size_t{0}}) {
    for (const Heuristic& h : propose(plan, key, workspace, kMostAnswers, reductions)) {
      Answer answer{h.algorithm, h.workspace, {}};
      if (h.workspace > workspace || wants_counter(h.workspace)) continue;
      if (!configuration_of(h.algorithm, answer.configuration)) continue;
      const bool known = std::ranges::any_of(
          answers, [&](const Answer& a) { return a.configuration == answer.configuration; });
      if (!known) answers.push_back(answer);
    }
  }
  return answers;
}

void choose(Plan& plan, const Key& key) {
  const auto take = [&](const Answer& answer) {
    plan.algorithm = answer.algorithm;
    plan.workspace = answer.workspace;
    plan.usable = true;
  };
  std::string_view why = "the first answer, no measured row";
  if (may_have_rows(key)) {
    const auto wanted = measured_algorithm(properties(key.device).name, signature_of(key));
    if (wanted) {
      for (const Answer& answer : answers_of(plan, key)) {
        if (answer.configuration != *wanted) continue;
        take(answer);
        if (kernel_log()) [[unlikely]]
          tell(key, "measured", &answer);
        return;
      }
      why = "the first answer, the library does not offer the measured one";
    } else if (!measured_products_enabled()) {
      why = "the first answer, rows are disabled";
    }
  }
  Answer answer;
  if (first_answer(plan, key, answer)) take(answer);
  if (kernel_log()) [[unlikely]]
    tell(key, plan.usable ? why : "the library has no algorithm", plan.usable ? &answer : nullptr);
}

void issue(const Plan& plan, const GemmProblem& p, Stream stream) {
  if (is_float8(p.dtype)) set_scales(plan, p.float8);
  if (p.aux)
    check_status(api().desc_set(plan.op, kDescAux, &p.aux, sizeof p.aux), "setting an epilogue");
  if (p.bias)
    check_status(api().desc_set(plan.op, kDescBias, &p.bias, sizeof p.bias), "setting a bias");
  const float alpha32 = static_cast<float>(p.alpha), beta32 = static_cast<float>(p.beta);
  const bool f64 = p.dtype == DType::Float64;
  const int32_t one = 1, zero = 0;
  const bool int8 = p.dtype == DType::Int8;
  const void* alpha = &alpha32;
  const void* beta = &beta32;
  if (f64) alpha = &p.alpha, beta = &p.beta;
  if (int8) alpha = &one, beta = &zero;
  const Workspace workspace(stream, plan.workspace);
  check_status(api().matmul(handle_of(stream.device), plan.op, alpha, p.b.data, plan.b, p.a.data,
                            plan.a, beta, p.c, plan.c, p.c, plan.c, &plan.algorithm,
                            workspace.data(), plan.workspace, stream.handle),
               "multiplying matrices");
}

}  // namespace vt::cuda::cublaslt
