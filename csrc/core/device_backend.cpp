#include "core/device_backend.h"

#include <dlfcn.h>

#include <mutex>

#include "core/error.h"
#include "core/library_folder.h"

namespace vt {
namespace {

DeviceBackend* cuda_backend = nullptr;
std::string cuda_problem;

void load_cuda() {
  const std::string path = library_folder() + "/libvt_cuda.so";
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return;
  // A missing file is the usual case: the build has no CUDA backend.
  const std::string reason = dlerror();
  cuda_problem = says_missing(reason, path)
                     ? "this build has no CUDA backend (build with -C cmake.define.VT_CUDA=ON)"
                     : "the CUDA backend could not be loaded: " + reason;
}

}  // namespace

void set_backend(DeviceType type, DeviceBackend* backend) {
  check(type == DeviceType::CUDA, "the CPU has no device backend");
  cuda_backend = backend;
}

DeviceBackend* backend_for(DeviceType type) {
  if (type == DeviceType::CPU) return nullptr;
  static std::once_flag once;
  std::call_once(once, [] {
    if (!cuda_backend) load_cuda();
  });
  return cuda_backend;
}

void before_fork() {
  if (cuda_backend) cuda_backend->before_fork();
}

void finish_backends() {
  if (cuda_backend) cuda_backend->finish();
}

std::string backend_problem(DeviceType type) {
  const DeviceBackend* backend = backend_for(type);
  return backend ? backend->problem() : cuda_problem;
}

Device resolve_device(Device device) {
  if (device.is_cpu()) return device;
  const DeviceBackend* backend = backend_for(device.type);
  const int count = backend ? backend->count() : 0;
  check(count > 0, "no CUDA device can be used: ", backend_problem(device.type));
  if (device.index < 0) device.index = static_cast<int8_t>(backend->current());
  check(device.index < count, "CUDA error: invalid device ordinal: ", device,
        " was asked for, but ",
        count == 1 ? "there is one device" : str("there are ", count, " devices"));
  return device;
}

}  // namespace vt
