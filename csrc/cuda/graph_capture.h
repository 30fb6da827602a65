// Stream capture of a program's kernel calls, and the graph that comes of it.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

#include "core/function_ref.h"
#include "cuda/allocator/caching_allocator.h"
#include "cuda/stream.h"
#include "graphs/lowering.h"

namespace vt::cuda {

struct CapturedGraph {
  CapturedGraph() = default;
  ~CapturedGraph();
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  /// Captures the calls on `stream`, which is made if it is not there, between what `begin` and
  /// `end` give to it. What they allocate comes from `pool`. Throws graphs::CallError where a call
  /// cannot be captured; streams and pool are then as before.
  void capture(Stream& stream, int device, const std::vector<graphs::Instruction>& calls,
               FunctionRef<void(Stream)> begin, FunctionRef<void(Stream)> end,
               CachingAllocator& allocator, MempoolId pool);
  /// Makes the graph ready to run, and brings it to the device on `stream`.
  void instantiate(Stream stream);
  /// Its nodes by what they are: "kernel", "memset", "memcpy", "other".
  std::map<std::string, size_t> kinds() const;

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  std::vector<size_t> nodes;  // that each call became
};

}  // namespace vt::cuda
