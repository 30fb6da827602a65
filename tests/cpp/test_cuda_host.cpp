// The backend's host code over a runtime without devices, two of them: streams, events and memory
// of each, libraries and how they are found, cuBLASLt in a library that stands for it, and what is
// left when calls fail.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>

#include "core/host_wait.h"
#include "cuda/allocator.h"
#include "cuda/cublaslt.h"
#include "cuda/failure.h"
#include "cuda/graph.h"
#include "cuda/library.h"
#include "cuda/measured_products.h"
#include "cuda/preload.h"
#include "cuda/product_trial.h"
#include "cuda/sync.h"
#include "fake_cublaslt.h"
#include "stub_cuda_runtime.h"
#include "test_cuda_allocator.h"

namespace vt::cuda {

size_t collect_graphs() { return 0; }  // there are none here

// In the place of the generated table: 77 x 77 x 77, and its tenfold for another GPU.
namespace {
constexpr AlgorithmConfiguration kCompiledIn{.id = 66, .tile = 20, .stages = 36};
}
std::span<const MeasuredProduct> compiled_products() {
  static const std::string gpu = properties(0).name;
  static const MeasuredProduct rows[] = {
      {gpu.c_str(), {DType::Float32, 0, 0, 1, 77, 77, 77}, kCompiledIn},
      {"another", {DType::Float32, 0, 0, 1, 770, 770, 770}, kCompiledIn}};
  return rows;
}

}  // namespace vt::cuda

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

// --- libraries

/// Stands for the lock of the embedding language.
std::mutex language;
thread_local bool holds_language = false;
std::atomic<int> searches{0};

void take_language() {
  language.lock();
  holds_language = true;
}
void leave_language() {
  holds_language = false;
  language.unlock();
}
void install_language() {
  set_host_wait_hooks({[]() -> void* {
                         if (!holds_language) return nullptr;
                         leave_language();
                         return &language;
                       },
                       [](void*) { take_language(); }});
}

std::string broken_library;

/// Finds libraries as the Python package does, with the language's lock.
std::string find(const char* name) {
  ++searches;
  const bool held = holds_language;
  if (!held) take_language();
  const std::string found = std::strcmp(name, "cublasLt") == 0 ? VT_FAKE_CUBLASLT : broken_library;
  if (!held) leave_language();
  return found;
}

FakeCublasLt& fake() {
  static FakeCublasLt* state = [] {
    void* handle = dlopen(VT_FAKE_CUBLASLT, RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<FakeCublasLt* (*)()>(dlsym(handle, "fake_cublaslt"))();
  }();
  return *state;
}

/// The first use of a library by a thread without the language's lock, which the search takes,
/// while another thread that has it comes to the same point.
void two_threads_open_a_library() {
  take_language();
  std::thread first([] { CHECK(cublaslt_version() == 130100); });
  while (searches == 0) std::this_thread::yield();
  CHECK(cublaslt_version() == 130100);
  CHECK(holds_language);
  leave_language();
  first.join();
}

void a_library_that_cannot_be_loaded_is_no_missing_one() {
  auto [kind, message] = error_of([] { Library("absent", "libvt_absent.so.1", "some-package"); });
  CHECK(contains(message,
                 "libvt_absent.so.1 was not found. Install it with: pip install some-package"));
  char name[] = "/tmp/vt_broken_XXXXXX";
  const int file = mkstemp(name);
  CHECK(file >= 0 && write(file, "no library", 10) == 10);
  close(file);
  broken_library = name;
  std::tie(kind, message) =
      error_of([] { Library("absent", "libvt_absent.so.1", "some-package"); });
  broken_library.clear();
  unlink(name);
  CHECK(contains(message,
                 "libvt_absent.so.1 is installed but cannot be loaded: " + std::string(name)));
  CHECK(!contains(message, "was not found"));
}

// --- products

GemmProblem product(int64_t n, const void* data, void* out, int64_t batch = 1) {
  GemmProblem p;
  p.batch = batch;
  p.m = p.n = p.k = n;
  p.a = p.b = {data, n, n * n, false};
  p.c = out;
  p.ldc = n;
  p.step_c = n * n;
  p.beta = 0;
  return p;
}

int64_t allocated_now() { return device_allocator(0).stats().allocated_bytes.all.current; }
int64_t allocated_in_product = 0;

void workspaces_come_from_the_allocator() {
  alignas(256) static float data[64];
  fake().workspace = 3 * MiB;
  fake().on_product = [] { allocated_in_product = allocated_now(); };
  const int64_t before = allocated_now();
  const Stream stream{nullptr, 0}, side = pool_stream(0, 0);
  CHECK(cublaslt_gemm(product(4, data, data), stream));
  CHECK(fake().last_workspace && fake().last_bytes == 3 * MiB);
  CHECK(allocated_in_product == before + static_cast<int64_t>(3 * MiB));
  CHECK(allocated_now() == before);
  void* const of_default = fake().last_workspace;
  for (int turn = 0; turn < 3; ++turn) {
    CHECK(cublaslt_gemm(product(4, data, data), side));
    CHECK(fake().last_workspace != of_default);
    CHECK(cublaslt_gemm(product(4, data, data), stream));
    CHECK(fake().last_workspace == of_default);
  }
  // Within the limits, and with the errors, of all memory.
  device_allocator(0).empty_cache();
  const size_t blocks = stub::memory_blocks();
  device_allocator(0).set_memory_limit(MiB);
  CHECK(error_of([&] { cublaslt_gemm(product(4, data, data), stream); }).first ==
        ErrorKind::OutOfMemory);
  CHECK(stub::memory_blocks() == blocks);
  device_allocator(0).set_memory_limit(AllocatorSettings::kNoLimit);
  CHECK(cublaslt_gemm(product(4, data, data), stream));
  fake().on_product = nullptr;
  fake().workspace = 0;
}

void shapes_without_end_are_not_kept() {
  alignas(256) static float data[64];
  std::thread([] {
    const int64_t before = fake().descriptions;
    for (int64_t n = 1; n <= 5000; ++n) cublaslt_gemm(product(n, data, data), {nullptr, 0});
    CHECK(fake().descriptions - before <= 4 * 4096);
    CHECK(cublaslt_gemm(product(5000, data, data), {nullptr, 0}));
  }).join();
}

/// Every call of the library fails in turn; the next product is made.
void every_call_of_the_library_fails_in_turn() {
  alignas(256) static float data[64];
  int felt = 0;
  std::thread([&] {
    int64_t n = 1;
    for (int64_t shape = 100;; ++n, ++shape) {  // a plan of its own each time
      const int64_t before = fake().descriptions;
      fake().calls = 0;
      fake().fail_at = n;
      const bool refused = contains(
          error_of([&] { cublaslt_gemm(product(shape, data, data, 2), {nullptr, 1}); }).second,
          "cuBLASLt error: the fake refuses");
      const bool over = fake().calls < n;
      fake().fail_at = 0;
      felt += refused;
      // A plan made before the product failed stays, with its four descriptions.
      const int64_t left = fake().descriptions - before;
      CHECK(left == 0 || left == 4);
      CHECK(cublaslt_gemm(product(shape + 1000, data, data, 2), {nullptr, 1}));
      if (over) break;
    }
    CHECK(n > 15 && felt > 12);
  }).join();
  CHECK(fake().handles == 2);  // one a device
}

// --- measured algorithms

/// As the attributes' numbers have it: id, tile, split-K, reduction, swizzle, option, stages, inner
/// shape, cluster shape.
FakeAnswer offered(const AlgorithmConfiguration& c, size_t workspace = 0) {
  return {.workspace = workspace,
          .configuration = {static_cast<uint32_t>(c.id), c.tile, static_cast<uint32_t>(c.split_k),
                            c.reduction, c.swizzle, c.custom, c.stages, c.inner, c.cluster}};
}
constexpr AlgorithmConfiguration kFirst{.id = 66, .tile = 24, .stages = 36, .cluster = 2};
constexpr AlgorithmConfiguration kSplit{
    .id = 66, .tile = 20, .split_k = 4, .reduction = 2, .stages = 36};

ProductSignature signature(int64_t n, int32_t flags = 0) {
  return {DType::Float32, flags, 0, 1, n, n, n};
}
void add(const ProductSignature& product, const AlgorithmConfiguration& algorithm,
         const std::string& gpu = properties(0).name) {
  const AddedProduct row{product, algorithm};
  add_measured_products(gpu, {&row, 1});
}

/// What a product was issued with, as its place among the answers; it was `asked` times for some.
int64_t chosen(const GemmProblem& p, int64_t asked) {
  fake().asked = 0;
  CHECK(cublaslt_gemm(p, {nullptr, 0}));
  CHECK(fake().asked == asked);
  fake().asked = 0;
  const int64_t algorithm = fake().last_algorithm;
  CHECK(cublaslt_gemm(p, {nullptr, 0}) && fake().last_algorithm == algorithm);
  CHECK(fake().asked == 0);  // the plan is kept
  return algorithm;
}

void measured_algorithms_are_taken() {
  alignas(256) static float data[64];
  const auto of = [&](int64_t n) { return product(n, data, data); };
  fake().answers = {offered(kFirst), offered(kCompiledIn), offered(kSplit, MiB)};
  fake().most_wanted = 0;
  CHECK(chosen(of(300), 1) == 0 && fake().most_wanted == 1);  // nothing was measured
  CHECK(chosen(of(77), 2) == 1 && fake().most_wanted == 16);  // compiled in
  CHECK(fake().last_bytes == 0);
  CHECK(chosen(of(770), 1) == 0);  // another GPU's
  // A row is seen by plans that were made before it.
  add(signature(300), kSplit);
  CHECK(chosen(of(300), 2) == 2 && fake().last_bytes == MiB);
  CHECK(chosen(of(77), 2) == 1);
  add(signature(77), kSplit);  // goes before what was compiled in
  add(signature(300), kFirst);
  CHECK(chosen(of(77), 2) == 2 && chosen(of(300), 2) == 0);
  add(signature(301), kSplit, "another");
  CHECK(chosen(of(301), 1) == 0);
  enable_measured_products(false);
  CHECK(!measured_products_enabled() && chosen(of(77), 1) == 0);
  enable_measured_products(true);
  CHECK(chosen(of(77), 2) == 2);
  remove_added_products();
  CHECK(chosen(of(77), 2) == 1 && chosen(of(300), 1) == 0);
  // Other threads choose alike.
  std::thread([&] { CHECK(chosen(of(77), 2) == 1); }).join();
}

void rows_are_of_one_product() {
  alignas(256) static float data[64];
  fake().answers = {offered(kFirst), offered(kSplit)};
  add(signature(400), kSplit);
  const GemmProblem plain = product(400, data, data);
  CHECK(chosen(plain, 2) == 1);
  std::vector<GemmProblem> others;
  const auto other = [&](auto&& change) {
    GemmProblem p = plain;
    change(p);
    others.push_back(p);
  };
  other([](GemmProblem& p) { p.m = 401; });
  other([](GemmProblem& p) { p.batch = 2; });
  other([](GemmProblem& p) { p.a.transposed = true; });
  other([](GemmProblem& p) { p.b.transposed = true; });
  other([](GemmProblem& p) { p.beta = 1; });
  other([](GemmProblem& p) { p.beta = -0.5; });
  other([](GemmProblem& p) { p.bias = data; });
  other([](GemmProblem& p) { p.epilogue = GemmEpilogue::Relu; });
  other([](GemmProblem& p) { p.dtype = DType::Float64; });
  for (size_t i = 0; i < others.size(); ++i) {
    // Half of a beta needs no plan of its own.
    CHECK(chosen(others[i], i == 5 ? 0 : 1) == 0);
  }
  add(signature(400, kAccumulate), kSplit);
  add(signature(400, kBias), kSplit);
  CHECK(chosen(others[4], 2) == 1 && chosen(others[6], 2) == 1 && chosen(plain, 2) == 1);
  // Strides are not in a row: each has a plan, and all the row's algorithm.
  GemmProblem strided = plain;
  strided.a.ld = 512;
  CHECK(chosen(strided, 2) == 1);
  strided.a.data = data + 1;
  CHECK(chosen(strided, 2) == 1);
  // Rows are of floats of 16 bits and more; others look for none.
  add({DType::Int8, kTransposeB, 0, 1, 400, 400, 400}, kSplit);
  GemmProblem bytes = plain;
  bytes.dtype = DType::Int8;
  bytes.b.transposed = true;
  CHECK(chosen(bytes, 1) == 0);
  remove_added_products();
}

void products_and_algorithms_have_words() {
  CHECK(describe(signature(77)) == "float32 nn batch=1 m=77 n=77 k=77");
  ProductSignature p = signature(8, kTransposeA | kBias | kAccumulate | kTf32);
  CHECK(describe(p) == "tf32 nt batch=1 m=8 n=8 k=8, bias, added");
  p = {DType::BFloat16, kTransposeB, static_cast<int32_t>(GemmEpilogue::GeluTanh), 3, 1, 2, 4};
  CHECK(describe(p) == "bfloat16 tn batch=3 m=1 n=2 k=4, gelu_tanh");
  CHECK(describe(kSplit) == "algorithm 66, tile 20, stages 36, split-K 4 (reduction 2)");
  CHECK(describe(kFirst) == "algorithm 66, tile 24, stages 36, cluster 2");
}

void what_is_not_offered_is_not_taken() {
  alignas(256) static float data[64];
  int64_t n = 500;
  const auto taken = [&](std::vector<FakeAnswer> answers, AlgorithmConfiguration wanted = kSplit,
                         int64_t asked = 3) {
    fake().answers = std::move(answers);
    add(signature(++n), wanted);
    return chosen(product(n, data, data), asked);
  };
  CHECK(taken({offered(kFirst)}) == 0);  // fewer than asked for
  CHECK(taken({offered(kFirst), offered(kSplit)}, kSplit, 2) == 1);
  for (int attribute = 0; attribute < 9; ++attribute) {  // any difference counts
    FakeAnswer near = offered(kSplit);
    ++near.configuration[attribute];
    CHECK(taken({offered(kFirst), near}) == 0);
  }
  for (int attribute = 0; attribute < 9; ++attribute) {  // not told by the library
    FakeAnswer untold = offered(kSplit);
    untold.untold = attribute;
    CHECK(taken({offered(kFirst), untold}) == 0);
    CHECK(taken({offered(kFirst), untold, offered(kSplit)}, kSplit, 2) == 2);
  }
  FakeAnswer broken = offered(kSplit);
  broken.state = 15;
  CHECK(taken({offered(kFirst), broken}) == 0);
  // One that needs more memory than is allowed, of a library that asks nobody.
  fake().ignores_limits = true;
  CHECK(taken({offered(kFirst), offered(kSplit, 64 * MiB)}) == 0);
  fake().ignores_limits = false;
  CHECK(taken({offered(kFirst), offered(kSplit, 64 * MiB)}) == 0);
  CHECK(taken({offered(kFirst), offered(kSplit, 32 * MiB)}, kSplit, 2) == 1);
  // A counter of tiles is no workspace: the same algorithm without one, where there is one.
  CHECK(taken({offered(kFirst), offered(kSplit, 4)}) == 0);
  CHECK(taken({offered(kFirst), offered(kSplit, 4), offered(kSplit)}, kSplit, 2) == 2);
  CHECK(fake().last_bytes == 0);
  CHECK(taken({offered(kFirst, 4), offered(kFirst)}, kCompiledIn, 4) == 1);
  // Beyond what is asked for.
  std::vector<FakeAnswer> many(20, offered(kFirst));
  many[15] = offered(kSplit);
  CHECK(taken(many, kSplit, 2) == 15);
  std::swap(many[15], many[16]);
  CHECK(taken(many) == 0);
  // Of results in 16 bits the parts of a sum stay in float.
  const AlgorithmConfiguration rounding{.id = 66, .tile = 20, .split_k = 4, .reduction = 4};
  fake().answers = {offered(kFirst), offered(rounding), offered(kSplit)};
  GemmProblem narrow = product(600, data, data);
  narrow.dtype = DType::BFloat16;
  ProductSignature row = signature(600);
  row.dtype = DType::BFloat16;
  add(row, rounding);
  CHECK(chosen(narrow, 3) == 0);
  add(row, kSplit);
  CHECK(chosen(narrow, 2) == 2 && fake().allowed_reductions == 2);
  add(signature(600), rounding);
  CHECK(chosen(product(600, data, data), 2) == 1 && fake().allowed_reductions == ~0u);
  remove_added_products();
}

void products_can_be_tried() {
  alignas(256) static float data[64];
  fake().answers = {offered(kFirst, 8), offered(kSplit, MiB), offered(kFirst), offered(kSplit),
                    offered(kCompiledIn)};
  ProductTrial trial(product(700, data, data), 0);
  CHECK(trial.answers() == 3);  // no two are alike
  CHECK(trial.configuration(0) == kFirst && trial.workspace(0) == 0);
  CHECK(trial.configuration(1) == kSplit && trial.workspace(1) == MiB);
  CHECK(trial.configuration(2) == kCompiledIn);
  for (const auto& [answer, place] : {std::pair<size_t, int64_t>{0, 2}, {1, 1}, {2, 4}, {0, 2}}) {
    trial.run(answer, nullptr);
    CHECK(fake().last_algorithm == place && fake().last_bytes == trial.workspace(answer));
  }
  bool refused = false;
  try {
    trial.run(3, nullptr);
  } catch (const std::out_of_range&) {
    refused = true;
  }
  CHECK(refused);
  // Each of them is what a row that names it gets.
  for (size_t i = 0; i < trial.answers(); ++i) {
    add(signature(700), trial.configuration(i));
    trial.run(i, nullptr);
    const int64_t place = fake().last_algorithm;
    CHECK(chosen(product(700, data, data), 2) == place);
  }
  remove_added_products();
  FakeAnswer untold = offered(kFirst);
  untold.untold = 4;
  fake().answers = {untold};
  CHECK(contains(error_of([&] { ProductTrial(product(701, data, data), 0); }).second,
                 "does not tell the configuration"));
  GemmProblem bytes = product(702, data, data);
  bytes.dtype = DType::Int8;
  CHECK(contains(error_of([&] { ProductTrial(bytes, 0); }).second, "floats of 16 bits or more"));
  const bool known = std::ranges::any_of(seen_products(), [](const SeenProduct& s) {
    return s.product == signature(700) && s.lda == 700 && s.step_c == 700 * 700 && s.device == 0 &&
           s.alignment == 256;
  });
  CHECK(known);
  CHECK(std::ranges::none_of(seen_products(),
                             [](const SeenProduct& s) { return s.product.m == 702; }));
}

void every_call_fails_while_a_row_is_looked_for() {
  alignas(256) static float data[64];
  fake().answers = {offered(kFirst), offered(kSplit)};
  std::thread([&] {
    const int64_t before = fake().descriptions;
    int felt = 0;
    for (int64_t n = 1, shape = 8000;; ++n, ++shape) {
      add(signature(shape), kSplit);  // and with it all plans are made again
      fake().calls = 0;
      fake().fail_at = n;
      const std::string message =
          error_of([&] { cublaslt_gemm(product(shape, data, data), {nullptr, 0}); }).second;
      const bool over = fake().calls < n;
      fake().fail_at = 0;
      CHECK(message.empty() || contains(message, "cuBLASLt error: the fake refuses"));
      felt += !message.empty();
      const int64_t left = fake().descriptions - before;
      CHECK(left == 0 || left == 4);
      CHECK(cublaslt_gemm(product(shape, data, data), {nullptr, 0}));
      if (over) break;
    }
    CHECK(felt > 15);
  }).join();
  remove_added_products();
  fake().answers.clear();
}

// --- streams, events and memory of two devices

void record_stream_minds_the_device() {
  const Stream own{nullptr, 0}, other{nullptr, 1}, side = pool_stream(1, 0);
  for (const Stream& stream : {other, side}) {
    Ref<Storage> storage = make_ref<Storage>(pinned_allocator().allocate(MiB), Device{});
    {
      const DeviceGuard guard(stream.device);
      stub::enqueue(stream.handle, [] {});
    }
    stub::enqueue(own.handle, [] {});
    record_stream(*storage, stream);
    record_stream(*storage, stream);
    CHECK(pinned_stats().pending_bytes == 0);
    storage.reset();
    CHECK(pinned_stats().pending_bytes == static_cast<int64_t>(MiB));
    synchronize(own);
    pinned_allocator().process_pending();
    CHECK(pinned_stats().pending_bytes == static_cast<int64_t>(MiB));
    release_stream(stream);
    CHECK(pinned_stats().pending_bytes == 0);
  }
}

void a_refused_wait_comes_before_the_work() {
  set_sync_debug(SyncDebug::Error);
  const int64_t before = implicit_syncs();
  CHECK(contains(error_of([] { announce_wait("copying"); }).second,
                 "called a synchronizing CUDA operation (copying)"));
  set_sync_debug(SyncDebug::Off);
  announce_wait("copying");
  CHECK(implicit_syncs() == before + 2);
}

/// Each call of the runtime that `body` makes fails in turn, until none does; whether all went well
/// in the end.
template <class F>
void every_call_fails_in_turn(const char* what, F&& body) {
  for (int64_t n = 1;; ++n) {
    stub::fail_call(n);
    const auto [kind, message] = error_of(body);
    const bool failed = stub::has_failed();
    stub::fail_call(0);
    cudaSetDevice(0);  // a guard's way back may be what failed, and has nobody to tell
    if (!failed) {
      CHECK_EMPTY(message);
      CHECK(n > 1);
      return;
    }
    if (message.empty()) continue;  // felt by nobody
    if (!contains(message, "CUDA error")) {
      CHECK_EMPTY(message);
      std::printf("with call %lld of %s failing\n", static_cast<long long>(n), what);
      return;
    }
  }
}

void failures_of_streams_and_events_are_told() {
  every_call_fails_in_turn("streams", [] {
    const Stream stream = pool_stream(1, 0);
    query(stream);
    is_captured(stream);
    synchronize(stream);
    synchronize_device(1);
    memory_info(1);
  });
  every_call_fails_in_turn("events", [] {
    Event event(true), end(true);
    const Stream stream = pool_stream(1, 0);
    event.record(stream);
    event.wait({nullptr, 0});
    end.record(stream);
    event.query();
    event.synchronize();
    end.synchronize();
    event.elapsed(end);
  });
}

void a_failure_slot_leaves_nothing_behind() {
  const size_t device = stub::memory_blocks(), host = stub::host_blocks();
  for (int64_t n = 1;; ++n) {
    stub::fail_call(n);
    const auto [kind, message] = error_of([] { failure_slot(1); });
    const bool failed = stub::has_failed();
    stub::fail_call(0);
    cudaSetDevice(0);
    if (!failed || message.empty()) break;  // the guard's way back comes once the slot is made
    CHECK(contains(message, "reserving memory for a kernel's failure") ||
          contains(message, "making a device current"));
    CHECK(stub::memory_blocks() == device && stub::host_blocks() == host);
  }
  CHECK(failure_slot(1) && failure_record(1));
  CHECK(stub::memory_blocks() == device + 1 && stub::host_blocks() == host + 1);
}

// --- what threads make ready

const EarlyKernels early(&early);
std::atomic<int> loads_begun{0}, loads{0};

/// The end of the process waits for them, while they may want what it holds, and starts no more. A
/// device that is none does no harm.
void preloads_are_waited_for() {
  stub::set_on_load([] {
    ++loads_begun;
    take_language();
    ++loads;
    leave_language();
  });
  const int64_t handles = fake().handles;
  take_language();
  preload(63);
  preload(1);
  preload(1);
  while (loads_begun == 0) std::this_thread::yield();
  CHECK(loads == 0);
  wait_for_preloads();
  CHECK(holds_language);
  CHECK(loads == 1);
  CHECK(fake().handles == handles + 1);
  finish_preloads();
  preload(0);
  wait_for_preloads();
  leave_language();
  CHECK(loads_begun == 1 && fake().handles == handles + 1);
  stub::set_on_load(nullptr);
}

void settings_are_refused_until_they_are_right() {
  const size_t device = stub::memory_blocks(), host = stub::host_blocks();
  setenv("VT_CUDA_ALLOC", "nonsense:1", 1);
  for (int turn = 0; turn < 2; ++turn) {
    CHECK(error_of([] { device_allocator(0); }).first == ErrorKind::Value);
    CHECK(error_of([] { pinned_allocator(); }).first == ErrorKind::Value);
  }
  unsetenv("VT_CUDA_ALLOC");
  CHECK(stub::memory_blocks() == device && stub::host_blocks() == host);
  for (int64_t n = 1; n < 20; ++n) {
    stub::fail_call(n);
    error_of([] { device_allocator(1); });
    error_of([] { pinned_allocator(); });
    stub::fail_call(0);
    cudaSetDevice(0);
  }
  device_allocator(1);
  pinned_allocator();
}

}  // namespace

int main() {
  alarm(200);  // a deadlock ends here
  setenv("VT_CUDA_PRELOAD", "1", 1);
  stub::set_device_count(2);
  install_allocator();
  install_language();
  set_library_finder(find);
  two_threads_open_a_library();
  preloads_are_waited_for();
  a_library_that_cannot_be_loaded_is_no_missing_one();
  settings_are_refused_until_they_are_right();
  workspaces_come_from_the_allocator();
  measured_algorithms_are_taken();
  rows_are_of_one_product();
  products_and_algorithms_have_words();
  what_is_not_offered_is_not_taken();
  products_can_be_tried();
  every_call_fails_while_a_row_is_looked_for();
  shapes_without_end_are_not_kept();
  every_call_of_the_library_fails_in_turn();
  record_stream_minds_the_device();
  a_refused_wait_comes_before_the_work();
  failures_of_streams_and_events_are_told();
  a_failure_slot_leaves_nothing_behind();
  return finish("test_cuda_host");
}
