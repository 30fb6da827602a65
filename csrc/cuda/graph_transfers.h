// What a captured step's graph does before and after the step's own kernels: it takes the control
// block from the host's memory, and copies inputs in and results out. So a replay is one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/stream.h"

namespace vt::cuda {

/// Page-locked slots that runs read in turn. `turn` is device memory: whose turn it is, which each
/// run moves on by one. Null slots: the control block is on the device already.
struct RunSlots {
  const std::byte* slots = nullptr;
  size_t pitch = 0;
  uint32_t count = 0;
  uint32_t* turn = nullptr;
};

/// Bytes of the graph's own, and where the control block has the address of the other end; null
/// there: nothing is copied.
struct TransferEntry {
  std::byte* place;
  uint64_t nbytes;
  uint64_t address;
};

/// Brings the next slot to `control`, and then every input whose address is in it to its place.
void begin_run(Stream stream, std::byte* control, size_t nbytes, const RunSlots& from,
               std::span<const TransferEntry> inputs);
/// Brings every result whose address is in `control` there.
void end_run(Stream stream, const std::byte* control, std::span<const TransferEntry> results);

/// Puts kernels in the place of a graph's memset nodes, as libraries leave them before products. A
/// graph that is a line of kernels is launched in a time that does not grow with it, and the device
/// goes from kernel to kernel without a pause.
void fill_by_kernels(cudaGraph_t graph);

}  // namespace vt::cuda
