#include "cuda/cublaslt.h"

#include <library_types.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "core/host_wait.h"
#include "core/kernel_switches.h"
#include "cuda/allocator.h"
#include "cuda/error.h"
#include "cuda/library.h"

namespace vt::cuda {
namespace {

// The part of cuBLASLt's binary interface that is used here (cuBLAS 13). The library is opened at
// run time, so a build needs no copy of it.
using Status = int;
using Handle = void*;
using Description = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
enum : int { kLayoutBatchCount = 5, kLayoutBatchStep = 6 };
enum : int { kDescTransposeA = 3, kDescTransposeB = 4, kDescEpilogue = 7, kDescBias = 8 };
enum : int { kDescAux = 11, kDescAuxStep = 12 };
enum : int { kDescScaleA = 17, kDescScaleB = 18, kDescFastAccumulate = 25 };
enum : int { kPreferWorkspace = 1, kPreferAlignmentA = 5 };
enum : int { kCompute32F = 68, kCompute64F = 70, kCompute32I = 72, kCompute32FTf32 = 77 };
enum : uint32_t {
  kEpilogueDefault = 1,
  kEpilogueRelu = 2,
  kEpilogueBias = 4,  // a bit that others may have beside theirs
  kEpilogueGeluAux = 32 | 128,
  kEpilogueDGelu = 64 | 128,
};

struct Api {
  Library library{"cublasLt", "libcublasLt.so.13", "nvidia-cublas"};
  Status (*create)(Handle*);
  Status (*matmul)(Handle, Description, const void* alpha, const void* a, Description,
                   const void* b, Description, const void* beta, const void* c, Description,
                   void* d, Description, const Algorithm*, void* workspace, size_t, cudaStream_t);
  Status (*heuristic)(Handle, Description, Description, Description, Description, Description,
                      Description preference, int wanted, Heuristic*, int* found);
  Status (*desc_create)(Description*, int compute, int scale);
  Status (*desc_destroy)(Description);
  Status (*desc_set)(Description, int attribute, const void*, size_t);
  Status (*layout_create)(Description*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*layout_destroy)(Description);
  Status (*layout_set)(Description, int attribute, const void*, size_t);
  Status (*preference_create)(Description*);
  Status (*preference_destroy)(Description);
  Status (*preference_set)(Description, int attribute, const void*, size_t);
  const char* (*status_name)(Status);
  size_t (*version)();

  Api() {
    library.bind(create, "cublasLtCreate");
    library.bind(matmul, "cublasLtMatmul");
    library.bind(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    library.bind(desc_create, "cublasLtMatmulDescCreate");
    library.bind(desc_destroy, "cublasLtMatmulDescDestroy");
    library.bind(desc_set, "cublasLtMatmulDescSetAttribute");
    library.bind(layout_create, "cublasLtMatrixLayoutCreate");
    library.bind(layout_destroy, "cublasLtMatrixLayoutDestroy");
    library.bind(layout_set, "cublasLtMatrixLayoutSetAttribute");
    library.bind(preference_create, "cublasLtMatmulPreferenceCreate");
    library.bind(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    library.bind(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    library.bind(status_name, "cublasLtGetStatusName");
    library.bind(version, "cublasLtGetVersion");
  }
};

const Api& api() {
  static constinit OpenedOnce<Api> instance;  // never destroyed: threads' plans may outlive statics
  return instance.get();
}

void check_status(Status status, std::string_view what) {
  if (status != 0) [[unlikely]]
    fail("cuBLASLt error: ", api().status_name(status), " while ", what);
}

Handle handle_of(int device) {
  static std::array<std::atomic<Handle>, kMaxDevices> handles{};
  std::atomic<Handle>& slot = handles[static_cast<size_t>(device)];
  if (const Handle made = slot.load(std::memory_order_acquire)) [[likely]]
    return made;
  const Api& library = api();
  const HostWait waiting;  // a handle loads kernels
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (!slot) {
    const DeviceGuard guard(device);
    Handle made = nullptr;
    check_status(library.create(&made), "creating a handle");
    slot = made;
  }
  return slot;
}

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

/// What a plan depends on; all bytes count, so there is no padding.
struct Key {
  int64_t batch, m, n, k, lda, ldb, ldc, step_a, step_b, step_c;
  int32_t dtype, device;
  int32_t flags;      // transposes, bias, TF32
  int32_t alignment;  // of the operands, bytes, a power of two
  int32_t epilogue;
  int32_t float8;  // the dtypes of b and c, and how sums are made; 0 for other products
  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(std::has_unique_object_representations_v<Key>);
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t words[sizeof(Key) / 8], h = 0x9E3779B97F4A7C15u;
    std::memcpy(words, &key, sizeof key);
    for (const uint64_t w : words) h = (h ^ w) * 0xD6E8FEB86659FD93u, h ^= h >> 32;
    return h;
  }
};

struct Plan {
  Description op = nullptr, a = nullptr, b = nullptr, c = nullptr;
  Algorithm algorithm{};
  size_t workspace = 0;  // bytes
  bool usable = false;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (const Description layout : {a, b, c}) {
      if (layout) api().layout_destroy(layout);
    }
    if (op) api().desc_destroy(op);
  }
};

/// Key::float8.
int32_t pack(const Float8Operands& f) {
  return static_cast<int32_t>(f.b) | static_cast<int32_t>(f.c) << 8 |
         (f.fast_accumulate ? 1 << 16 : 0) | (f.scale_a ? 1 << 17 : 0) | (f.scale_b ? 1 << 18 : 0);
}

enum Flag : int32_t { kTransposeA = 1, kTransposeB = 2, kBias = 4, kTf32 = 8 };

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

/// The library's first choice of those that need no more than `workspace` bytes.
Heuristic propose(const Plan& plan, const Key& key, uint64_t workspace) {
  struct Preference {
    Description made = nullptr;
    ~Preference() {
      if (made) api().preference_destroy(made);
    }
  } preference;
  check_status(api().preference_create(&preference.made), "creating a preference");
  check_status(
      api().preference_set(preference.made, kPreferWorkspace, &workspace, sizeof workspace),
      "setting a preference");
  const auto alignment = static_cast<uint32_t>(key.alignment);
  for (int operand = 0; operand < 4; ++operand) {
    check_status(api().preference_set(preference.made, kPreferAlignmentA + operand, &alignment,
                                      sizeof alignment),
                 "setting a preference");
  }
  Heuristic result{};
  int found = 0;
  const Status status = api().heuristic(handle_of(key.device), plan.op, plan.b, plan.a, plan.c,
                                        plan.c, preference.made, 1, &result, &found);
  if (status != 0 || found == 0) result.state = 1;
  return result;
}
bool is_found(const Heuristic& result) { return result.state == 0; }

// Of a thread. Each takes some hundred bytes of ours and of the library's.
constexpr size_t kMostPlans = 4096;

// What an algorithm asks for that only wants a counter of tiles.
constexpr size_t kCounterBytes = 16;

/// The library's a is our b.
void set_scales(const Plan& plan, const Float8Operands& f) {
  if (f.scale_b)
    check_status(api().desc_set(plan.op, kDescScaleA, &f.scale_b, sizeof f.scale_b),
                 "setting a scale");
  if (f.scale_a)
    check_status(api().desc_set(plan.op, kDescScaleB, &f.scale_a, sizeof f.scale_a),
                 "setting a scale");
}

void make_plan(Plan& plan, const Key& key, const Float8Operands& float8) {
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
  Heuristic chosen = propose(plan, key, kWorkspaceBytes);
  // Persistent kernels may take their tiles from a counter, which a memset before each launch has
  // to clear: 2 us in a stream, 4 us in a graph. Without memory for it they divide the tiles
  // beforehand, which has not been slower for any product that was measured.
  if (is_found(chosen) && chosen.workspace > 0 && chosen.workspace <= kCounterBytes) {
    const Heuristic divided = propose(plan, key, 0);
    if (is_found(divided)) chosen = divided;
  }
  plan.usable = is_found(chosen);
  plan.algorithm = chosen.algorithm;
  plan.workspace = chosen.workspace;
}

int32_t alignment_of(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 256;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return static_cast<int32_t>(bits & (~bits + 1));
}

}  // namespace

int64_t cublaslt_version() { return static_cast<int64_t>(api().version()); }

bool cublaslt_gemm(const GemmProblem& p, Stream stream) {
  const bool use_tf32 = p.dtype == DType::Float32 && kernel_switch(KernelSwitch::MatmulTf32);
  const Key key{p.batch,
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
                stream.device,
                (p.a.transposed ? kTransposeA : 0) | (p.b.transposed ? kTransposeB : 0) |
                    (p.bias ? kBias : 0) | (use_tf32 ? kTf32 : 0),
                alignment_of({p.a.data, p.b.data, p.c, p.bias ? p.bias : p.c, p.aux ? p.aux : p.c}),
                static_cast<int32_t>(p.epilogue),
                is_float8(p.dtype) ? pack(p.float8) : 0};
  // Per thread, so that no lock is taken and the bias pointer of a descriptor is not shared.
  thread_local std::unordered_map<Key, std::unique_ptr<Plan>, KeyHash> plans;
  auto found = plans.find(key);
  if (found == plans.end()) [[unlikely]] {
    auto made = std::make_unique<Plan>();
    make_plan(*made, key, p.float8);
    if (plans.size() >= kMostPlans) plans.clear();  // of shapes that change without end
    found = plans.emplace(key, std::move(made)).first;
  }
  Plan& plan = *found->second;
  if (!plan.usable) return false;
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
  return true;
}

}  // namespace vt::cuda
