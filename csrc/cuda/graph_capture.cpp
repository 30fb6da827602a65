#include "cuda/graph_capture.h"

#include <utility>

#include "cuda/error.h"
#include "cuda/graph_transfers.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

using graphs::CallError;
using graphs::Instruction;

/// A capture under way: the stream is the thread's current one, and the pool serves it.
class StreamCapture {
 public:
  StreamCapture(Stream stream, CachingAllocator& allocator, MempoolId pool)
      : stream_(stream),
        before_(current_stream(stream.device)),
        was_capturing_(capturing()),
        allocator_(allocator),
        pool_(pool) {
    allocator_.begin_allocate_to_pool(pool_,
                                      AllocationRoute::this_thread_on_stream(stream_.handle));
    // Relaxed: what other threads do is no concern of ours, and the allocator and the libraries may
    // ask the driver for memory. No call of the program waits for the device (wait_for_result).
    const cudaError_t begun = cudaStreamBeginCapture(stream_.handle, cudaStreamCaptureModeRelaxed);
    if (begun != cudaSuccess) {
      allocator_.end_allocate_to_pool(pool_);
      cuda_failed(begun, "beginning to capture a step");
    }
    set_current_stream(stream_);
    detail::capturing = true;
  }
  ~StreamCapture() {
    if (open_) {
      cudaGraph_t left = nullptr;
      cudaStreamEndCapture(stream_.handle, &left);
      if (left) cudaGraphDestroy(left);
      cudaGetLastError();
    }
    set_current_stream(before_);
    detail::capturing = was_capturing_;
    allocator_.end_allocate_to_pool(pool_);
  }
  StreamCapture(const StreamCapture&) = delete;
  StreamCapture& operator=(const StreamCapture&) = delete;

  /// Nodes so far. Throws once the driver has given the capture up.
  size_t nodes() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamGetCaptureInfo(stream_.handle, &status, &id, &graph),
               "asking for the state of a capture");
    check(status == cudaStreamCaptureStatusActive,
          "the driver has given up the capture: the op made a call that a graph cannot have");
    size_t count = 0;
    check_cuda(cudaGraphGetNodes(graph, nullptr, &count), "counting the nodes of a graph");
    return count;
  }
  cudaGraph_t end() {
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamEndCapture(stream_.handle, &graph), "ending the capture of a step");
    open_ = false;
    return graph;
  }

 private:
  Stream stream_, before_;
  bool was_capturing_, open_ = true;
  CachingAllocator& allocator_;
  MempoolId pool_;
};

/// A stream that nobody else has. One that a failed capture has left unusable is replaced.
void make_ready(Stream& stream, int device) {
  if (stream.handle && !is_captured(stream)) return;
  stream = {nullptr, device};
  check_cuda(cudaStreamCreateWithFlags(&stream.handle, cudaStreamNonBlocking),
             "creating a stream for captures");
}

}  // namespace

CapturedGraph::~CapturedGraph() {
  const RelaxedCapture relaxed;
  if (executable) cudaGraphExecDestroy(executable);
  if (graph) cudaGraphDestroy(graph);
}

void CapturedGraph::capture(Stream& stream, int device, const std::vector<Instruction>& calls,
                            FunctionRef<void(Stream)> begin, FunctionRef<void(Stream)> end,
                            CachingAllocator& allocator, MempoolId pool) {
  make_ready(stream, device);
  StreamCapture capture(stream, allocator, pool);
  begin(stream);
  size_t before = capture.nodes();
  for (size_t i = 0; i < calls.size(); ++i) {
    try {
      calls[i].execute();
      const size_t now = capture.nodes();
      nodes.push_back(now - before);
      before = now;
    } catch (const Error& error) {
      throw CallError(error.kind(),
                      str("op ", i + 1, " of ", calls.size(), ", ", op_name(calls[i].id),
                          ", cannot be part of a CUDA graph: ", error.message()),
                      i);
    }
  }
  end(stream);
  graph = capture.end();
  fill_by_kernels(graph);
}

void CapturedGraph::instantiate(Stream stream) {
  const RelaxedCapture relaxed;
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "making a graph ready to run");
  check_cuda(cudaGraphUpload(executable, stream.handle), "bringing a graph to the device");
}

std::map<std::string, size_t> CapturedGraph::kinds() const {
  size_t count = 0;
  check_cuda(cudaGraphGetNodes(graph, nullptr, &count), "counting the nodes of a graph");
  std::vector<cudaGraphNode_t> all(count);
  check_cuda(cudaGraphGetNodes(graph, all.data(), &count), "listing the nodes of a graph");
  std::map<std::string, size_t> found;
  for (const cudaGraphNode_t node : all) {
    cudaGraphNodeType type{};
    check_cuda(cudaGraphNodeGetType(node, &type), "asking for the type of a node");
    switch (type) {
      case cudaGraphNodeTypeKernel:
        ++found["kernel"];
        break;
      case cudaGraphNodeTypeMemset:
        ++found["memset"];
        break;
      case cudaGraphNodeTypeMemcpy:
        ++found["memcpy"];
        break;
      default:
        ++found["other"];
        break;
    }
  }
  return found;
}

}  // namespace vt::cuda
