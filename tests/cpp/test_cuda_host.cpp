// The backend's host code over a runtime without devices, two of them: streams, events and memory
// of each, libraries and how they are found, cuBLASLt in a library that stands for it, and what is
// left when calls fail.
#include <dlfcn.h>
#include <unistd.h>

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
#include "cuda/sync.h"
#include "fake_cublaslt.h"
#include "stub_cuda_runtime.h"
#include "test_cuda_allocator.h"

namespace vt::cuda {

size_t collect_graphs() { return 0; }  // there are none here

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
  stub::set_device_count(2);
  install_allocator();
  install_language();
  set_library_finder(find);
  two_threads_open_a_library();
  a_library_that_cannot_be_loaded_is_no_missing_one();
  settings_are_refused_until_they_are_right();
  workspaces_come_from_the_allocator();
  shapes_without_end_are_not_kept();
  every_call_of_the_library_fails_in_turn();
  record_stream_minds_the_device();
  a_refused_wait_comes_before_the_work();
  failures_of_streams_and_events_are_told();
  a_failure_slot_leaves_nothing_behind();
  return finish("test_cuda_host");
}
