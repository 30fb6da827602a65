// The first and the last kernel of a captured step's graph (cuda/graph_transfers.h). A slot lies in
// the host's memory, so each block reads the few addresses it needs once, and one of them brings the
// block of numbers over.
#include "cuda/graph_transfers.h"

#include <algorithm>

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

}  // namespace

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
