#include "cuda/cudnn.h"

#include <array>
#include <memory>
#include <mutex>

#include "core/host_wait.h"
#include "cuda/cudnn_graph.h"
#include "cuda/error.h"

namespace vt::cuda {
namespace cudnn {
namespace {

/// cuDNN opens these itself by file name: having them loaded lets it find those of our packages.
void open_companions() {
  for (const auto& [name, file] : {std::pair{"cublas", "libcublas.so.13"},
                                   {"cublasLt", "libcublasLt.so.13"},
                                   {"nvrtc", "libnvrtc.so.13"}})
    Library::open_if_found(name, file);
}

struct Loaded {
  std::unique_ptr<const Api> api;
  std::string problem;
  Loaded() {
    try {
      open_companions();
      api = std::make_unique<const Api>();
      const size_t version = api->version();
      if (version < 90000) {
        problem = str(api->library.path(), " is cuDNN ", version, "; version 9 is needed");
        api.reset();
      }
    } catch (const Error& error) {
      api.reset();
      problem = error.what();
    }
  }
};

const Loaded& loaded() {
  static constinit OpenedOnce<Loaded>
      instance;  // never destroyed: plans may outlive static objects
  return instance.get();
}

thread_local std::string refusal;

/// Contexts that no thread uses at the moment, by device.
struct Pool {
  std::mutex mutex;
  std::array<std::vector<std::unique_ptr<Context>>, kMaxDevices> free;
};
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

struct Leases {
  std::array<std::unique_ptr<Context>, kMaxDevices> contexts;
  ~Leases() {
    const std::lock_guard lock(pool().mutex);
    for (size_t device = 0; device < kMaxDevices; ++device) {
      if (contexts[device]) pool().free[device].push_back(std::move(contexts[device]));
    }
  }
};

}  // namespace

const Api& api() {
  const Loaded& l = loaded();
  check(l.api != nullptr, l.problem);
  return *l.api;
}

void check_status(Status status, std::string_view what) {
  if (status == 0) [[likely]]
    return;
  char message[512] = "";
  api().last_error(message, sizeof message);
  fail("cuDNN error: ", api().error_string(status), " while ", what, message[0] ? ": " : "",
       message);
}

Context::Context(int device) {
  const Api& library = api();
  const DeviceGuard guard(device);
  const HostWait waiting;  // loads more libraries
  check_status(library.create(&handle_), "creating a handle");
}

Context& Context::of_device(int device) {
  thread_local Leases leases;
  std::unique_ptr<Context>& mine = leases.contexts[static_cast<size_t>(device)];
  if (!mine) [[unlikely]] {
    {
      const std::lock_guard lock(pool().mutex);
      auto& free = pool().free[static_cast<size_t>(device)];
      if (!free.empty()) {
        mine = std::move(free.back());
        free.pop_back();
      }
    }
    if (!mine) mine = std::make_unique<Context>(device);
  }
  return *mine;
}

Context& Context::of(Stream stream) {
  Context& context = of_device(stream.device);
  if (context.stream_ != stream.handle) {
    check_status(api().set_stream(context.handle_, stream.handle), "choosing a stream");
    context.stream_ = stream.handle;
  }
  return context;
}

Plans make_plans(Graph& graph, Handle handle, const PlanLimits& limits) {
  const HostWait waiting;  // planning takes up to a second
  Plans plans = graph.plans(handle, limits);
  if (plans.empty()) refusal = graph.refusal();
  return plans;
}

}  // namespace cudnn

bool cudnn_available() { return cudnn::loaded().api != nullptr; }
const std::string& cudnn_problem() { return cudnn::loaded().problem; }
int64_t cudnn_version() {
  return cudnn_available() ? static_cast<int64_t>(cudnn::api().version()) : 0;
}
const std::string& cudnn_refusal() { return cudnn::refusal; }
int64_t cudnn_runs() { return cudnn::plan_runs.load(std::memory_order_relaxed); }

}  // namespace vt::cuda
