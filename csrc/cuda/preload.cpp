#include "cuda/preload.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <bitset>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/environment.h"
#include "core/host_wait.h"
#include "cuda/cublaslt_plan.h"
#include "cuda/device.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

std::vector<const void*>& early_kernels() {
  static auto* const all = new std::vector<const void*>;
  return *all;
}

/// The threads of the process that started them: a forked child has none. Never destroyed, as
/// threads that were not waited for would end the process.
struct Preloads {
  std::mutex mutex;
  std::mutex joining;  // held by who joins threads, which may be waiting for `mutex`'s holder
  std::bitset<kMaxDevices> devices;
  std::vector<std::thread> threads;
  std::atomic<bool> ending{false};
  const pid_t process = getpid();

  void start(int device, void (*task)(int device)) {
    threads.emplace_back([device, task] {
      try {
        task(device);
      } catch (...) {  // those who need it try again
      }
    });
  }
};
Preloads& preloads() {
  static auto* const instance = new Preloads;
  return *instance;
}

/// Makes the library's handle, and has it choose an algorithm.
void open_cublaslt(int device) {
  cublaslt::api();  // needs no device, which may still be starting
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;  // others may be capturing
  GemmProblem problem;
  problem.dtype = DType::BFloat16;
  problem.m = problem.n = problem.k = 64;
  problem.a.ld = problem.b.ld = problem.ldc = 64;
  const cublaslt::Key key = cublaslt::key_of(problem, device);
  cublaslt::Plan plan;
  cublaslt::describe(plan, key, {});
  cublaslt::Answer answer;
  cublaslt::first_answer(plan, key, answer);
}

void load_kernels(int device) {
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  for (const void* kernel : early_kernels()) {
    if (preloads().ending.load(std::memory_order_relaxed)) break;
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, kernel);
  }
}

}  // namespace

EarlyKernels::EarlyKernels(const void* kernel) { early_kernels().push_back(kernel); }

void preload(int device) {
  static const bool wanted = env_flag("VT_CUDA_PRELOAD", true);
  Preloads& p = preloads();
  if (!wanted || p.process != getpid()) return;
  const std::lock_guard lock(p.mutex);
  if (p.ending || p.devices.test(static_cast<size_t>(device))) return;
  p.devices.set(static_cast<size_t>(device));
  try {
    p.start(device, open_cublaslt);
    p.start(device, load_kernels);
  } catch (const std::system_error&) {  // there are too many threads
  }
}

void wait_for_preloads() {
  Preloads& p = preloads();
  if (p.process != getpid()) return;
  const HostWait waiting;  // Python may be looking for a library
  const std::lock_guard joining(p.joining);
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(p.mutex);
    threads.swap(p.threads);
  }
  for (std::thread& thread : threads) thread.join();
}

void finish_preloads() {
  preloads().ending = true;
  wait_for_preloads();
}

}  // namespace vt::cuda
