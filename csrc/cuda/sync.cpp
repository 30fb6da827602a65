#include "cuda/sync.h"

#include <atomic>
#include <cstdlib>

#include "core/environment.h"
#include "core/host_wait.h"
#include "cuda/error.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

SyncDebug from_environment() {
  const char* text = std::getenv("VT_SYNC_DEBUG");
  if (!text || !*text || std::string_view(text) == "off") return SyncDebug::Off;
  if (std::string_view(text) == "warn") return SyncDebug::Warn;
  if (std::string_view(text) == "error") return SyncDebug::Error;
  fail(ErrorKind::Value, "VT_SYNC_DEBUG must be off, warn or error, got '", text, "'");
}

std::atomic<SyncDebug>& mode() {
  static std::atomic<SyncDebug> value{from_environment()};
  return value;
}
std::atomic<void (*)(const char*)> warning{nullptr};
std::atomic<int64_t> count{0};

}  // namespace

const bool launch_blocking = env_flag("VT_CUDA_LAUNCH_BLOCKING", false);

SyncDebug sync_debug() { return mode().load(std::memory_order_relaxed); }
void set_sync_debug(SyncDebug value) { mode().store(value); }
void set_sync_warning(void (*warn)(const char*)) { warning = warn; }
int64_t implicit_syncs() { return count.load(std::memory_order_relaxed); }

void announce_wait(std::string_view what) {
  check(!capturing(), "the host would have to wait for the device (", what,
        "), which it cannot in a captured step");
  count.fetch_add(1, std::memory_order_relaxed);
  if (const SyncDebug debug = sync_debug(); debug != SyncDebug::Off) [[unlikely]] {
    const std::string message = str("called a synchronizing CUDA operation (", what, ")");
    check(debug != SyncDebug::Error, message);
    if (const auto warn = warning.load()) warn(message.c_str());
  }
}

void wait_for_announced(cudaStream_t stream, std::string_view what) {
  const HostWait waiting;
  check_cuda(cudaStreamSynchronize(stream), what);
}

void wait_if_blocking(cudaStream_t stream) {
  if (!launch_blocking || capturing()) [[likely]]
    return;
  const HostWait waiting;
  check_cuda(cudaStreamSynchronize(stream), "running the kernel just launched");
}

void wait_for_result(cudaStream_t stream, std::string_view what) {
  announce_wait(what);
  wait_for_announced(stream, what);
}

}  // namespace vt::cuda
