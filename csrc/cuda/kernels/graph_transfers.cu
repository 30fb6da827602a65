// The first and the last kernels of a captured step's graph (cuda/graph_transfers.h). Slots lie in the
// host's memory: one block reads one, since reads of it by many wait for each other (1 us a block), and
// all others find what it brought on the device.
#include "cuda/graph_transfers.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "cuda/kernels/launch.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 16;  // of a launch
// A block copies this much at least.
constexpr size_t kBlockBytes = size_t{8} << 10;
constexpr unsigned kMostFillBlocks = 2048;

struct Entries {
  TransferEntry all[kEntries];
  int count;
};

/// Copies bytes, with all threads of the grid.
__device__ void copy_bytes(std::byte* to, const std::byte* from, uint64_t nbytes) {
  constexpr int kAhead = 4;  // loads under way
  const uint64_t first = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  uint64_t done = 0;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % sizeof(uint4) == 0) {
    const uint64_t words = nbytes / sizeof(uint4);
    for (uint64_t i = first; i < words; i += kAhead * step) {
      uint4 held[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (i + a * step < words) held[a] = reinterpret_cast<const uint4*>(from)[i + a * step];
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (i + a * step < words) reinterpret_cast<uint4*>(to)[i + a * step] = held[a];
      }
    }
    done = words * sizeof(uint4);
  }
  for (uint64_t i = done + first; i < nbytes; i += step) to[i] = from[i];
}

/// The addresses of the entries, for all threads of a block.
__device__ void read_addresses(std::byte* (&found)[kEntries], const Entries& entries,
                               const std::byte* control) {
  if (threadIdx.x < static_cast<unsigned>(entries.count)) {
    const std::byte* at = control + entries.all[threadIdx.x].address;
    found[threadIdx.x] = reinterpret_cast<std::byte*>(*reinterpret_cast<const uint64_t*>(at));
  }
  __syncthreads();
}

__device__ void bring_inputs(const std::byte* control, const Entries& entries) {
  __shared__ std::byte* other[kEntries];
  read_addresses(other, entries, control);
  for (int i = 0; i < entries.count; ++i) {
    if (other[i]) copy_bytes(entries.all[i].place, other[i], entries.all[i].nbytes);
  }
}

/// One block: the slot whose turn it is becomes the control block, and the next one has the turn.
/// Then inputs that one block brings as fast as many.
__global__ void __launch_bounds__(kThreads)
    fetch_control_kernel(std::byte* control, uint64_t nbytes, RunSlots from,
                         const __grid_constant__ Entries entries) {
  constexpr int kAhead = 8;  // loads under way
  const uint32_t turn = *from.turn;
  const auto* words = reinterpret_cast<const volatile uint64_t*>(from.slots + turn * from.pitch);
  auto* const to = reinterpret_cast<uint64_t*>(control);
  const uint64_t count = nbytes / sizeof(uint64_t);
  for (uint64_t i = threadIdx.x; i < count; i += kAhead * kThreads) {
    uint64_t held[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * kThreads < count) held[a] = words[i + a * kThreads];
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * kThreads < count) to[i + a * kThreads] = held[a];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *from.turn = (turn + 1) % from.count;
  if (entries.count > 0) bring_inputs(control, entries);
}

__global__ void __launch_bounds__(kThreads)
    bring_inputs_kernel(const std::byte* control, const __grid_constant__ Entries entries) {
  bring_inputs(control, entries);
}

__global__ void __launch_bounds__(kThreads)
    send_results_kernel(const std::byte* control, const __grid_constant__ Entries entries) {
  __shared__ std::byte* other[kEntries];
  read_addresses(other, entries, control);
  for (int i = 0; i < entries.count; ++i) {
    if (other[i]) copy_bytes(other[i], entries.all[i].place, entries.all[i].nbytes);
  }
}

/// The next entries for a launch, and blocks for them.
Entries next_entries(std::span<const TransferEntry>& left, const Launch& launch, dim3& grid) {
  Entries entries{};
  size_t bytes = 0;
  while (!left.empty() && entries.count < kEntries) {
    entries.all[entries.count++] = left.front();
    bytes += left.front().nbytes;
    left = left.subspan(1);
  }
  const auto blocks = static_cast<int64_t>(ceil_div(std::max<size_t>(bytes, 1), kBlockBytes));
  grid = dim3(static_cast<unsigned>(launch.fill(blocks, kThreads)));
  return entries;
}

/// A memset node's work: `height` rows of `width` bytes, each with the four bytes of `pattern` over and
/// over. Pieces of 16 bytes, and single bytes before the first and after the last of them: elements
/// lie at multiples of their size, so that the pattern is the same from every piece's start on.
__global__ void __launch_bounds__(kThreads)
    fill_kernel(std::byte* to, uint64_t pitch, uint32_t pattern, uint64_t width, uint64_t height) {
  const uint64_t first = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  const uint4 piece{pattern, pattern, pattern, pattern};
  for (uint64_t row = blockIdx.y; row < height; row += gridDim.y) {
    std::byte* const at = to + row * pitch;
    const uint64_t before = min(uint64_t{-reinterpret_cast<uintptr_t>(at) % sizeof(uint4)}, width);
    const uint64_t pieces = (width - before) / sizeof(uint4);
    for (uint64_t i = first; i < pieces; i += step)
      reinterpret_cast<uint4*>(at + before)[i] = piece;
    const uint64_t after = before + pieces * sizeof(uint4);
    for (uint64_t i = first; i < before + (width - after); i += step) {
      const uint64_t byte = i < before ? i : after + (i - before);
      at[byte] = static_cast<std::byte>(pattern >> byte % sizeof(pattern) * 8);
    }
  }
}

using Nodes = std::vector<cudaGraphNode_t>;

/// The nodes before or after one; nothing where an edge is of a special kind.
std::optional<Nodes> neighbours(cudaGraphNode_t node, decltype(&cudaGraphNodeGetDependencies) ask) {
  size_t count = 0;
  check_cuda(ask(node, nullptr, nullptr, &count), "asking for a node's edges");
  Nodes found(count);
  std::vector<cudaGraphEdgeData> edges(count);
  if (count > 0)
    check_cuda(ask(node, found.data(), edges.data(), &count), "asking for a node's edges");
  const auto plain = [](const cudaGraphEdgeData& edge) {
    return edge.type == cudaGraphDependencyTypeDefault && edge.from_port == 0 && edge.to_port == 0;
  };
  if (!std::all_of(edges.begin(), edges.end(), plain)) return std::nullopt;
  return found;
}

void replace_fill(cudaGraph_t graph, cudaGraphNode_t node) {
  const std::optional<Nodes> before = neighbours(node, cudaGraphNodeGetDependencies);
  const std::optional<Nodes> after = neighbours(node, cudaGraphNodeGetDependentNodes);
  if (!before || !after) return;
  cudaMemsetParams fill{};
  check_cuda(cudaGraphMemsetNodeGetParams(node, &fill), "asking for a memset's arguments");
  if (fill.width == 0 || fill.height == 0) return;
  auto* to = static_cast<std::byte*>(fill.dst);
  uint64_t pitch = fill.pitch, width = uint64_t{fill.width} * fill.elementSize,
           height = fill.height;
  if (pitch == width) {
    width *= height;
    height = 1;
  }
  uint32_t pattern = fill.elementSize == 1   ? (fill.value & 0xff) * 0x01010101u
                     : fill.elementSize == 2 ? (fill.value & 0xffff) * 0x00010001u
                                             : fill.value;
  void* arguments[] = {&to, &pitch, &pattern, &width, &height};
  cudaKernelNodeParams kernel{};
  kernel.func = reinterpret_cast<void*>(fill_kernel);
  const auto across = static_cast<unsigned>(std::min<uint64_t>(
      ceil_div<uint64_t>(width, sizeof(uint4) * kThreads), kMostFillBlocks));
  kernel.gridDim =
      dim3(across, static_cast<unsigned>(std::min<uint64_t>(height, kMostFillBlocks / across)));
  kernel.blockDim = dim3(kThreads);
  kernel.kernelParams = arguments;
  cudaGraphNode_t made = nullptr;
  check_cuda(cudaGraphAddKernelNode(&made, graph, before->data(), before->size(), &kernel),
             "putting a kernel in the place of a memset");
  for (const cudaGraphNode_t next : *after)
    check_cuda(cudaGraphAddDependencies(graph, &made, &next, nullptr, 1), "joining a node");
  check_cuda(cudaGraphDestroyNode(node), "removing a memset");
}

}  // namespace

void fill_by_kernels(cudaGraph_t graph) {
  size_t count = 0;
  check_cuda(cudaGraphGetNodes(graph, nullptr, &count), "counting the nodes of a graph");
  Nodes nodes(count);
  if (count > 0) check_cuda(cudaGraphGetNodes(graph, nodes.data(), &count), "listing a graph");
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    check_cuda(cudaGraphNodeGetType(node, &type), "asking for the type of a node");
    if (type == cudaGraphNodeTypeMemset) replace_fill(graph, node);
  }
}

void begin_run(Stream stream, std::byte* control, size_t nbytes, const RunSlots& from,
               std::span<const TransferEntry> inputs) {
  const Launch launch(Device{DeviceType::CUDA, static_cast<int8_t>(stream.device)});
  dim3 grid;
  if (from.slots) {
    const auto add = [](size_t sum, const TransferEntry& e) { return sum + e.nbytes; };
    const size_t bytes = std::accumulate(inputs.begin(), inputs.end(), size_t{0}, add);
    Entries few{};
    if (bytes <= kBlockBytes && inputs.size() <= kEntries)
      few = next_entries(inputs, launch, grid);
    launch(fetch_control_kernel, dim3(1), dim3(kThreads), 0, control, nbytes, from, few);
  }
  while (!inputs.empty()) {
    const Entries entries = next_entries(inputs, launch, grid);
    launch(bring_inputs_kernel, grid, dim3(kThreads), 0, control, entries);
  }
}

void end_run(Stream stream, const std::byte* control, std::span<const TransferEntry> results) {
  const Launch launch(Device{DeviceType::CUDA, static_cast<int8_t>(stream.device)});
  while (!results.empty()) {
    dim3 grid;
    const Entries entries = next_entries(results, launch, grid);
    launch(send_results_kernel, grid, dim3(kThreads), 0, control, entries);
  }
}

}  // namespace vt::cuda
