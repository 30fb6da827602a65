#include "stub_cuda_runtime.h"

#include <cuda.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

using vt::stub::Work;

struct CUgraph_st {
  std::vector<Work> nodes;
};
struct CUgraphExec_st {
  std::vector<Work> nodes;
};
struct CUstream_st {
  int device = 0;
  std::deque<Work> waiting;
  uint64_t given = 0, done = 0;
  std::unique_ptr<CUgraph_st> captured;
  bool spoilt = false;
};
struct CUevent_st {
  int device = 0;
  CUstream_st* stream = nullptr;
  uint64_t after = 0;
};

namespace {

std::recursive_mutex mutex;
constexpr int kMost = 2;
int devices = 1;
thread_local int current = 0;
CUstream_st default_streams[kMost] = {{.device = 0}, {.device = 1}};
std::vector<CUstream_st*>& streams() {
  static auto* all = new std::vector<CUstream_st*>{&default_streams[0], &default_streams[1]};
  return *all;
}
std::map<void*, size_t>& blocks() {
  static auto* all = new std::map<void*, size_t>;
  return *all;
}
int64_t calls_left = 0;
bool failed = false;
int live_graphs = 0;
size_t live_host_blocks = 0;
int64_t launched_kernels = 0, launched_graphs = 0;
std::atomic<void (*)()> on_load{nullptr};
thread_local uintptr_t context = 1;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

CUstream_st* stream_of(cudaStream_t stream) { return stream ? stream : &default_streams[current]; }

/// Whether this call is the one that fails.
bool fails() {
  if (calls_left == 0 || --calls_left != 0) return false;
  failed = true;
  return true;
}

void run_until(CUstream_st* stream, uint64_t count) {
  while (stream->done < count && !stream->waiting.empty()) {
    const Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    ++stream->done;
    work();
  }
}

}  // namespace

namespace vt::stub {

cudaError_t enqueue(cudaStream_t handle, Work work) {
  const std::lock_guard lock(mutex);
  CUstream_st* stream = stream_of(handle);
  if (stream->captured) {
    stream->captured->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  stream->waiting.push_back(std::move(work));
  ++stream->given;
  return cudaSuccess;
}
void finish_all() {
  const std::lock_guard lock(mutex);
  for (CUstream_st* stream : streams()) run_until(stream, stream->given);
}
void fail_call(int64_t n) {
  calls_left = n;
  failed = false;
}
bool has_failed() { return failed; }
int captures() {
  int count = 0;
  for (const CUstream_st* stream : streams()) count += stream->captured != nullptr;
  return count;
}
int graphs() { return live_graphs; }
void set_device_count(int count) { devices = count; }
size_t memory_blocks() {
  const std::lock_guard lock(mutex);
  return blocks().size();
}
size_t host_blocks() {
  const std::lock_guard lock(mutex);
  return live_host_blocks;
}
void set_context(uintptr_t value) { context = value; }
int64_t kernel_launches() { return launched_kernels; }
int64_t graph_launches() { return launched_graphs; }
void set_on_load(void (*function)()) { on_load = function; }

}  // namespace vt::stub

namespace {

/// A launch of a kernel with the arguments as they are now.
Work work_of(const void* function, void** arguments) {
  const auto* kernel = static_cast<const vt::stub::Kernel*>(function);
  std::vector<std::vector<std::byte>> copies;
  for (size_t i = 0; i < kernel->argument_sizes.size(); ++i) {
    const auto* from = static_cast<const std::byte*>(arguments[i]);
    copies.emplace_back(from, from + kernel->argument_sizes[i]);
  }
  return [kernel, copies] { kernel->run(copies); };
}

}  // namespace

// What a failing call says; work is refused, so nothing else happens.
#define STUB_ENTER                         \
  const std::lock_guard enter_lock(mutex); \
  if (fails()) return cudaErrorUnknown

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  STUB_ENTER;
  if (device < 0 || device >= devices) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = devices, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  return p->major = 9, p->multiProcessorCount = 132, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 0, cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaErrorNotSupported;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaErrorNotSupported;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaErrorNotSupported; }
cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) { return *value = 0, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  return *low = *high = 0, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "stub"; }
const char* cudaGetErrorString(cudaError_t) { return "the stub refuses"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  if (void (*const function)() = on_load) function();
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  return std::swap(mode, *other), cudaSuccess;
}

// Memory.
cudaError_t cudaMalloc(void** pointer, size_t n) {
  STUB_ENTER;
  *pointer = std::aligned_alloc(512, (n + 511) / 512 * 512);
  blocks()[*pointer] = n;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  const std::lock_guard lock(mutex);
  blocks().erase(pointer);
  return std::free(pointer), cudaSuccess;
}
cudaError_t cudaMallocAsync(void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaFreeAsync(void*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaHostAlloc(void** pointer, size_t n, unsigned) {
  STUB_ENTER;
  *pointer = std::aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  ++live_host_blocks;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  const std::lock_guard lock(mutex);
  --live_host_blocks;
  return std::free(pointer), cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  STUB_ENTER;
  return *free = *total = size_t{1} << 33, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes*, const void*) {
  return cudaErrorInvalidValue;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  STUB_ENTER;
  return std::memcpy(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind,
                            cudaStream_t stream) {
  STUB_ENTER;
  return vt::stub::enqueue(stream, [=] { std::memcpy(to, from, n); });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t stream) {
  STUB_ENTER;
  return vt::stub::enqueue(stream, [=] { std::memset(to, value, n); });
}

// Streams and events.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  STUB_ENTER;
  streams().push_back(*stream = new CUstream_st{.device = current});
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  STUB_ENTER;
  CUstream_st* stream = stream_of(handle);
  if (stream->captured) return stream->spoilt = true, cudaErrorStreamCaptureUnsupported;
  return run_until(stream, stream->given), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  STUB_ENTER;
  bool refused = false;
  for (CUstream_st* stream : streams())
    if (stream->captured && stream->device == current) refused = stream->spoilt = true;
  if (refused) return cudaErrorStreamCaptureUnsupported;
  for (CUstream_st* stream : streams())
    if (stream->device == current) run_until(stream, stream->given);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const CUstream_st* stream = stream_of(handle);
  return stream->done == stream->given ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  STUB_ENTER;
  CUstream_st* other = event->stream;
  const uint64_t after = event->after;
  return other ? vt::stub::enqueue(stream, [=] { run_until(other, after); }) : cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  STUB_ENTER;
  return *event = new CUevent_st{.device = current}, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  STUB_ENTER;
  if (stream_of(stream)->device != event->device) return cudaErrorInvalidResourceHandle;
  event->stream = stream_of(stream);
  event->after = event->stream->given;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  STUB_ENTER;
  return !event->stream || event->stream->done >= event->after ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  STUB_ENTER;
  if (event->stream) run_until(event->stream, event->after);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 0, cudaSuccess;
}

// Captures and graphs.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  STUB_ENTER;
  if (!stream || stream->captured) return cudaErrorIllegalState;
  stream->captured = std::make_unique<CUgraph_st>();
  stream->spoilt = false;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  STUB_ENTER;
  if (!stream->captured) return cudaErrorIllegalState;
  const std::unique_ptr<CUgraph_st> made = std::move(stream->captured);
  *graph = nullptr;
  if (stream->spoilt) return cudaErrorStreamCaptureInvalidated;
  *graph = new CUgraph_st{made->nodes};
  ++live_graphs;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  STUB_ENTER;
  *status =
      stream_of(stream)->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  STUB_ENTER;
  CUstream_st* stream = stream_of(handle);
  *status = !stream->captured ? cudaStreamCaptureStatusNone
            : stream->spoilt  ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  if (id) *id = reinterpret_cast<uintptr_t>(stream->captured.get());
  if (graph) *graph = stream->captured.get();
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  STUB_ENTER;
  if (nodes) std::fill_n(nodes, *count, nullptr);
  return *count = graph->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
  STUB_ENTER;
  return *type = cudaGraphNodeTypeKernel, cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  STUB_ENTER;
  ++live_graphs;
  return *made = new CUgraphExec_st{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  STUB_ENTER;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  STUB_ENTER;
  ++launched_graphs;
  // As the hardware does, a launch has its nodes once it is given.
  return vt::stub::enqueue(stream, [nodes = graph->nodes] {
    for (const Work& node : nodes) node();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return --live_graphs, delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return --live_graphs, delete graph, cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) {
  STUB_ENTER;
  return cudaSuccess;
}

// Kernels, by the runtime and by the driver.
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  STUB_ENTER;
  *function = reinterpret_cast<cudaFunction_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void** arguments, size_t,
                             cudaStream_t stream) {
  STUB_ENTER;
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  ++launched_kernels;
  return vt::stub::enqueue(stream, work_of(kernel, arguments));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  STUB_ENTER;
  const dim3 grid = config->gridDim;
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& cluster = config->attrs[i].val.clusterDim;
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension &&
        (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z))
      return cudaErrorInvalidConfiguration;
  }
  ++launched_kernels;
  return vt::stub::enqueue(config->stream, work_of(kernel, arguments));
}

}  // extern "C"

#define STUB_DRIVER_ENTER                  \
  const std::lock_guard enter_lock(mutex); \
  if (fails()) return CUDA_ERROR_UNKNOWN

namespace {

CUresult get_context(CUcontext* current) {
  STUB_DRIVER_ENTER;
  return *current = reinterpret_cast<CUcontext>(context), CUDA_SUCCESS;
}
CUresult launch_kernel(CUfunction function, unsigned x, unsigned, unsigned, unsigned, unsigned,
                       unsigned, unsigned, CUstream stream, void** arguments, void**) {
  STUB_DRIVER_ENTER;
  if (x == 0) return CUDA_ERROR_INVALID_VALUE;
  if (context != 1) return CUDA_ERROR_INVALID_HANDLE;
  ++launched_kernels;
  vt::stub::enqueue(stream, work_of(function, arguments));
  return CUDA_SUCCESS;
}
CUresult graph_create(CUgraph* graph, unsigned) {
  STUB_DRIVER_ENTER;
  ++live_graphs;
  return *graph = new CUgraph_st, CUDA_SUCCESS;
}
CUresult graph_add(CUgraphNode* node, CUgraph graph, const CUgraphNode*, size_t,
                   const CUDA_KERNEL_NODE_PARAMS* p) {
  STUB_DRIVER_ENTER;
  if (p->gridDimX == 0) return CUDA_ERROR_INVALID_VALUE;
  graph->nodes.push_back(work_of(p->func, p->kernelParams));
  return *node = reinterpret_cast<CUgraphNode>(graph->nodes.size()), CUDA_SUCCESS;
}
CUresult graph_instantiate(CUgraphExec* made, CUgraph graph, unsigned long long) {
  STUB_DRIVER_ENTER;
  if (mode != cudaStreamCaptureModeRelaxed && vt::stub::captures() > 0)
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  ++live_graphs;
  return *made = new CUgraphExec_st{graph->nodes}, CUDA_SUCCESS;
}
CUresult graph_set(CUgraphExec graph, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS* p) {
  STUB_DRIVER_ENTER;
  if (p->gridDimX == 0) return CUDA_ERROR_INVALID_VALUE;
  graph->nodes[reinterpret_cast<size_t>(node) - 1] = work_of(p->func, p->kernelParams);
  return CUDA_SUCCESS;
}
CUresult graph_launch(CUgraphExec graph, CUstream stream) {
  return cudaGraphLaunch(graph, stream) == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
}
CUresult graph_destroy(CUgraph graph) {
  const std::lock_guard lock(mutex);
  return cudaGraphDestroy(graph), CUDA_SUCCESS;
}
CUresult graph_exec_destroy(CUgraphExec graph) {
  const std::lock_guard lock(mutex);
  return cudaGraphExecDestroy(graph), CUDA_SUCCESS;
}

struct Entry {
  std::string_view name;
  void* function;
};
/// `Like` is the driver's own function, for its type.
template <class Like>
void* address(Like function) {
  return reinterpret_cast<void*>(function);
}
const Entry kDriver[] = {
    {"cuCtxGetCurrent", address<decltype(&cuCtxGetCurrent)>(get_context)},
    {"cuLaunchKernel", address<decltype(&cuLaunchKernel)>(launch_kernel)},
    {"cuGraphCreate", address<decltype(&cuGraphCreate)>(graph_create)},
    {"cuGraphAddKernelNode", address<decltype(&cuGraphAddKernelNode)>(graph_add)},
    {"cuGraphInstantiateWithFlags",
     address<decltype(&cuGraphInstantiateWithFlags)>(graph_instantiate)},
    {"cuGraphExecKernelNodeSetParams",
     address<decltype(&cuGraphExecKernelNodeSetParams)>(graph_set)},
    {"cuGraphLaunch", address<decltype(&cuGraphLaunch)>(graph_launch)},
    {"cuGraphDestroy", address<decltype(&cuGraphDestroy)>(graph_destroy)},
    {"cuGraphExecDestroy", address<decltype(&cuGraphExecDestroy)>(graph_exec_destroy)},
};

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** pointer, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  const auto* found = std::find_if(std::begin(kDriver), std::end(kDriver),
                                   [&](const Entry& entry) { return entry.name == name; });
  const bool known = found != std::end(kDriver);
  *pointer = known ? found->function : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
