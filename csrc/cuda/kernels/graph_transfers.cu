// The first and the last kernel of a captured step's graph (cuda/graph_transfers.h). A slot lies in
// the host's memory, so each block reads the few addresses it needs once, and one of them brings the
// block of numbers over.
#include "cuda/graph_transfers.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/kernels/launch.cuh"

namespace vt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 16;  // of a launch
// A block copies this much at least.
constexpr size_t kBlockBytes = size_t{16} << 10;

struct Entries {
  TransferEntry all[kEntries];
  int count;
};

/// Copies bytes, with all threads of the grid.
__device__ void copy_bytes(std::byte* to, const std::byte* from, uint64_t nbytes) {
  const uint64_t first = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  uint64_t done = 0;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % sizeof(uint4) == 0) {
    const uint64_t words = nbytes / sizeof(uint4);
    for (uint64_t i = first; i < words; i += step)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    done = words * sizeof(uint4);
  }
  for (uint64_t i = done + first; i < nbytes; i += step) to[i] = from[i];
}

/// The addresses of the entries, read by the first warp of each block.
__device__ void read_addresses(std::byte* (&found)[kEntries], const Entries& entries,
                               const std::byte* control) {
  if (threadIdx.x < static_cast<unsigned>(entries.count)) {
    const std::byte* at = control + entries.all[threadIdx.x].address;
    found[threadIdx.x] =
        reinterpret_cast<std::byte*>(*reinterpret_cast<const volatile uint64_t*>(at));
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    begin_run_kernel(std::byte* control, uint64_t nbytes, RunSlots from,
                     const __grid_constant__ Entries entries) {
  __shared__ std::byte* other[kEntries];
  const std::byte* slot = control;
  if (from.slots) {
    const uint32_t turn = *static_cast<const volatile uint32_t*>(from.turn);
    slot = from.slots + turn * from.pitch;
    if (blockIdx.x == 0) {
      const auto* words = reinterpret_cast<const volatile uint64_t*>(slot);
      for (uint64_t i = threadIdx.x; i < nbytes / sizeof(uint64_t); i += blockDim.x)
        reinterpret_cast<uint64_t*>(control)[i] = words[i];
    }
  }
  read_addresses(other, entries, slot);
  for (int i = 0; i < entries.count; ++i) {
    if (other[i]) copy_bytes(entries.all[i].place, other[i], entries.all[i].nbytes);
  }
  if (!from.slots || threadIdx.x != 0) return;
  // Every thread of the block has read the turn. The last block moves it on.
  __threadfence();
  if (atomicAdd(from.turn + 1, 1u) != gridDim.x - 1) return;
  from.turn[1] = 0;
  from.turn[0] = (*static_cast<volatile uint32_t*>(from.turn) + 1) % from.count;
}

__global__ void __launch_bounds__(kThreads)
    end_run_kernel(const std::byte* control, const __grid_constant__ Entries entries) {
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

/// A memset node's work: `height` rows of `width` elements of `size` bytes.
__global__ void __launch_bounds__(kThreads)
    fill_kernel(std::byte* to, uint64_t pitch, uint32_t value, uint32_t size, uint64_t width,
                uint64_t height) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x, n = width * height;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    std::byte* at = to + i / width * pitch + i % width * size;
    if (size == 4)
      *reinterpret_cast<uint32_t*>(at) = value;
    else if (size == 2)
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(value);
    else
      *reinterpret_cast<uint8_t*>(at) = static_cast<uint8_t>(value);
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
  uint64_t pitch = fill.pitch, width = fill.width, height = fill.height;
  uint32_t value = fill.value, size = fill.elementSize;
  void* arguments[] = {&to, &pitch, &value, &size, &width, &height};
  cudaKernelNodeParams kernel{};
  kernel.func = reinterpret_cast<void*>(fill_kernel);
  kernel.gridDim = dim3(
      static_cast<unsigned>(std::min<uint64_t>(ceil_div<uint64_t>(width * height, kThreads), 1024)));
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
  RunSlots slots = from;
  while (slots.slots || !inputs.empty()) {
    dim3 grid;
    const Entries entries = next_entries(inputs, launch, grid);
    launch(begin_run_kernel, grid, dim3(kThreads), 0, control, nbytes,
           slots, entries);
    slots = {};  // further entries find the control block on the device
  }
}

void end_run(Stream stream, const std::byte* control, std::span<const TransferEntry> results) {
  const Launch launch(Device{DeviceType::CUDA, static_cast<int8_t>(stream.device)});
  while (!results.empty()) {
    dim3 grid;
    const Entries entries = next_entries(results, launch, grid);
    launch(end_run_kernel, grid, dim3(kThreads), 0, control,
           entries);
  }
}

}  // namespace vt::cuda
