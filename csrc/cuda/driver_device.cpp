#include "cuda/driver_device.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <vector>

#include "cuda/capture_gate.h"
#include "cuda/device.h"
#include "cuda/driver_function.h"
#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

/// The driver's functions that the runtime does not offer.
struct Driver {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free_range = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  bool complete = true;

  Driver() {
    find(reserve, "cuMemAddressReserve");
    find(free_range, "cuMemAddressFree");
    find(create, "cuMemCreate");
    find(release, "cuMemRelease");
    find(map, "cuMemMap");
    find(unmap, "cuMemUnmap");
    find(set_access, "cuMemSetAccess");
    find(granularity, "cuMemGetAllocationGranularity");
  }
  template <class F>
  void find(F& function, const char* name) {
    complete = find_driver_function(function, name) && complete;
  }
};
const Driver& driver() {
  static const Driver instance;
  return instance;
}

ApiStatus status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  ApiCode code = ApiCode::Failed;
  switch (error) {
    case cudaErrorNotReady:
      code = ApiCode::NotReady;
      break;
    case cudaErrorMemoryAllocation:
      code = ApiCode::OutOfMemory;
      break;
    case cudaErrorNotSupported:
      code = ApiCode::NotSupported;
      break;
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorCapturedEvent:
      code = ApiCode::Capturing;
      break;
    case cudaErrorCudartUnloading:
    case cudaErrorContextIsDestroyed:
      code = ApiCode::Dead;
      break;
    default:
      break;
  }
  return {code, static_cast<int>(error), error_message(error)};
}

ApiStatus status(CUresult result) {
  if (result == CUDA_SUCCESS) return {};
  // The runtime numbers the driver's errors alike.
  const char* message = error_message(static_cast<cudaError_t>(result));
  const ApiCode code =
      result == CUDA_ERROR_OUT_OF_MEMORY   ? ApiCode::OutOfMemory
      : result == CUDA_ERROR_NOT_SUPPORTED ? ApiCode::NotSupported
      : result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_CONTEXT_IS_DESTROYED
          ? ApiCode::Dead
          : ApiCode::Failed;
  return {code, static_cast<int>(result), message};
}

/// The device is current and captures do not object, for one call.
class Call {
 public:
  explicit Call(int device) : guard_(device) {}

 private:
  DeviceGuard guard_;
  RelaxedCapture relaxed_;
};

CUmemAllocationProp physical_memory(int device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  return prop;
}

cudaStream_t stream_of(StreamHandle handle) { return static_cast<cudaStream_t>(handle); }
cudaEvent_t event_of(EventHandle handle) { return static_cast<cudaEvent_t>(handle); }

}  // namespace

DriverDevice::DriverDevice(int device) : device_(device) {
  const DeviceGuard guard(device);
  check_cuda(cudaFree(nullptr), "starting the device");
  int supported = 0;
  check_cuda(cudaDeviceGetAttribute(&supported, cudaDevAttrMemoryPoolsSupported, device),
             "asking for memory pools");
  async_ = supported != 0;
  if (async_) {
    // The driver gives a pool's memory back at every synchronization unless told to keep it.
    cudaMemPool_t pool;
    uint64_t keep = UINT64_MAX;
    check_cuda(cudaDeviceGetDefaultMemPool(&pool, device), "getting the memory pool");
    check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep),
               "setting up the memory pool");
  }
  const CUmemAllocationProp prop = physical_memory(device);
  if (driver().complete)
    driver().granularity(&granularity_, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

ApiStatus DriverDevice::memory_info(size_t* free, size_t* total) {
  const Call call(device_);
  return status(cudaMemGetInfo(free, total));
}

ApiStatus DriverDevice::reserve_range(size_t nbytes, uintptr_t* address) {
  const Call call(device_);
  CUdeviceptr pointer = 0;
  const ApiStatus result = status(driver().reserve(&pointer, nbytes, 0, 0, 0));
  *address = static_cast<uintptr_t>(pointer);
  return result;
}
ApiStatus DriverDevice::free_range(uintptr_t address, size_t nbytes) {
  const Call call(device_);
  return status(driver().free_range(address, nbytes));
}
ApiStatus DriverDevice::create_physical(size_t nbytes, PhysicalHandle* handle) {
  const Call call(device_);
  const CUmemAllocationProp prop = physical_memory(device_);
  CUmemGenericAllocationHandle made = 0;
  const ApiStatus result = status(driver().create(&made, nbytes, &prop, 0));
  *handle = made;
  return result;
}
ApiStatus DriverDevice::release_physical(PhysicalHandle handle) {
  const Call call(device_);
  return status(driver().release(handle));
}
ApiStatus DriverDevice::map(uintptr_t address, size_t nbytes, PhysicalHandle handle) {
  const Call call(device_);
  return status(driver().map(address, nbytes, 0, handle, 0));
}
ApiStatus DriverDevice::unmap(uintptr_t address, size_t nbytes) {
  const Call call(device_);
  return status(driver().unmap(address, nbytes));
}
ApiStatus DriverDevice::set_access(uintptr_t address, size_t nbytes) {
  const Call call(device_);
  // Mapped memory is open to the devices named here only, so peers are named with their owner.
  std::vector<CUmemAccessDesc> open;
  for (int other = 0; other < device_count(); ++other) {
    int peer = other == device_;
    if (!peer) cudaDeviceCanAccessPeer(&peer, other, device_);
    if (peer)
      open.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, {other}}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  }
  return status(driver().set_access(address, nbytes, open.data(), open.size()));
}

ApiStatus DriverDevice::allocate(size_t nbytes, uintptr_t* address) {
  const Call call(device_);
  void* data = nullptr;
  const ApiStatus result = status(cudaMalloc(&data, nbytes));
  *address = reinterpret_cast<uintptr_t>(data);
  return result;
}
ApiStatus DriverDevice::free(uintptr_t address) {
  const Call call(device_);
  return status(cudaFree(reinterpret_cast<void*>(address)));
}
ApiStatus DriverDevice::allocate_async(size_t nbytes, StreamHandle stream, uintptr_t* address) {
  const DeviceGuard guard(device_);
  void* data = nullptr;
  const ApiStatus result = status(cudaMallocAsync(&data, nbytes, stream_of(stream)));
  *address = reinterpret_cast<uintptr_t>(data);
  return result;
}
ApiStatus DriverDevice::free_async(uintptr_t address, StreamHandle stream) {
  const DeviceGuard guard(device_);
  return status(cudaFreeAsync(reinterpret_cast<void*>(address), stream_of(stream)));
}
ApiStatus DriverDevice::trim_async(size_t* released) {
  const Call call(device_);
  *released = 0;
  cudaMemPool_t pool = nullptr;
  uint64_t before = 0, after = 0;
  cudaError_t error = cudaDeviceGetDefaultMemPool(&pool, device_);
  if (error == cudaSuccess)
    error = cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &before);
  if (error == cudaSuccess) error = cudaMemPoolTrimTo(pool, 0);
  if (error == cudaSuccess)
    error = cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &after);
  if (error == cudaSuccess && after < before) *released = before - after;
  return status(error);
}

ApiStatus DriverDevice::create_event(EventHandle* event) {
  const Call call(device_);
  cudaEvent_t made = nullptr;
  const ApiStatus result = status(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
  *event = made;
  return result;
}
ApiStatus DriverDevice::destroy_event(EventHandle event) {
  const Call call(device_);
  return status(cudaEventDestroy(event_of(event)));
}
ApiStatus DriverDevice::record_event(EventHandle event, StreamHandle stream) {
  const DeviceGuard guard(device_);
  return status(cudaEventRecord(event_of(event), stream_of(stream)));
}
ApiStatus DriverDevice::query_event(EventHandle event) {
  const Call call(device_);
  return status(cudaEventQuery(event_of(event)));
}
ApiStatus DriverDevice::synchronize_event(EventHandle event) {
  const Call call(device_);
  return status(cudaEventSynchronize(event_of(event)));
}
ApiStatus DriverDevice::wait_event(StreamHandle stream, EventHandle event) {
  const DeviceGuard guard(device_);
  return status(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0));
}
ApiStatus DriverDevice::synchronize_stream(StreamHandle stream) {
  const Call call(device_);
  return status(cudaStreamSynchronize(stream_of(stream)));
}
ApiStatus DriverDevice::synchronize_device() {
  const DeviceWaitScope apart(device_);
  const Call call(device_);
  return status(cudaDeviceSynchronize());
}
ApiStatus DriverDevice::capture_id(StreamHandle stream, uint64_t* id) {
  *id = 0;
  if (!stream) return {};  // the default stream cannot be captured
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const ApiStatus result = status(cudaStreamGetCaptureInfo(stream_of(stream), &state, &capture));
  if (result.ok() && state != cudaStreamCaptureStatusNone) *id = capture;
  return result;
}

ApiStatus DriverDevice::allocate_host(size_t nbytes, void** data) {
  const Call call(device_);
  return status(cudaHostAlloc(data, nbytes, cudaHostAllocPortable));
}
ApiStatus DriverDevice::free_host(void* data) {
  const Call call(device_);
  return status(cudaFreeHost(data));
}

}  // namespace vt::cuda
