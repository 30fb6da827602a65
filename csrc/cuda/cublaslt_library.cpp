#include "cuda/cublaslt_library.h"

#include <array>
#include <atomic>
#include <mutex>

#include "core/host_wait.h"
#include "cuda/device.h"
#include "cuda/error.h"

namespace vt::cuda::cublaslt {

Api::Api() {
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
  library.bind(config_get, "cublasLtMatmulAlgoConfigGetAttribute");
}

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

}  // namespace vt::cuda::cublaslt
