#include "cuda/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "core/host_wait.h"
#include "cuda/capture_gate.h"
#include "cuda/error.h"

namespace vt::cuda {
namespace {

struct Count {
  int value = 0;
  std::string problem;
};

const Count& count() {
  static const Count result = [] {
    Count c;
    const cudaError_t error = cudaGetDeviceCount(&c.value);
    if (error != cudaSuccess) {
      cudaGetLastError();
      c.value = 0;
      c.problem = error == cudaErrorInsufficientDriver
                      ? "no NVIDIA driver that supports CUDA 13 is installed"
                      : std::string("the driver says: ") + cudaGetErrorString(error);
    } else if (c.value == 0) {
      c.problem = "the driver lists no GPU (is CUDA_VISIBLE_DEVICES empty?)";
    }
    c.value = std::min(c.value, kMaxDevices);
    return c;
  }();
  return result;
}

}  // namespace

int device_count() { return count().value; }
std::string device_problem() { return count().problem; }

const DeviceProperties& properties(int device) {
  static std::array<DeviceProperties, kMaxDevices> all;
  static std::array<std::once_flag, kMaxDevices> once;
  check(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", device);
  std::call_once(once[device], [device] {
    cudaDeviceProp p;
    check_cuda(cudaGetDeviceProperties(&p, device), "reading a device's properties");
    all[device] = {p.name,
                   p.major,
                   p.minor,
                   p.multiProcessorCount,
                   static_cast<int64_t>(p.totalGlobalMem),
                   p.l2CacheSize,
                   static_cast<int>(p.sharedMemPerBlockOptin),
                   p.maxThreadsPerMultiProcessor,
                   p.warpSize,
                   p.pciBusID,
                   p.pciDeviceID,
                   p.pciDomainID};
  });
  return all[device];
}

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  return device;
}

void set_device(int device) {
  check(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", device,
        "; there are ", device_count(), " devices");
  check_cuda(cudaSetDevice(device), "making a device current");
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(old_);
}

void synchronize_device(int device) {
  const DeviceGuard guard(device);
  const HostWait waiting;
  const DeviceWaitScope apart(device);
  check_cuda(cudaDeviceSynchronize(), "synchronizing the device");
}

MemoryInfo memory_info(int device) {
  const DeviceGuard guard(device);
  MemoryInfo info;
  check_cuda(cudaMemGetInfo(&info.free, &info.total), "reading free memory");
  return info;
}

int runtime_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "reading the runtime's version");
  return version;
}

int driver_version() {
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "reading the driver's version");
  return version;
}

std::string built_architectures() { return VT_BUILT_ARCHS; }

bool can_access_peer(int device, int peer) {
  int result = 0;
  check_cuda(cudaDeviceCanAccessPeer(&result, device, peer), "asking for peer access");
  return result != 0;
}

bool enable_peer_access(int device, int peer) {
  static std::array<std::array<std::atomic<int8_t>, kMaxDevices>, kMaxDevices> known{};
  std::atomic<int8_t>& state = known[device][peer];  // 0 unknown, 1 enabled, 2 impossible
  if (state == 0) {
    if (!can_access_peer(device, peer)) {
      state = 2;
    } else {
      const HostWait waiting;  // this may start the device, and maps all of the peer's memory
      const DeviceGuard guard(device);
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();
      else
        check_cuda(error, "enabling peer access");
      state = 1;
    }
  }
  return state == 1;
}

}  // namespace vt::cuda
