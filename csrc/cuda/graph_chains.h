// What captured steps (graph.cpp) ask of the kernels of chains (kernels/fused_pointwise.cpp).
#pragma once

#include <span>
#include <string>

#include "graphs/lowering.h"

namespace vt::cuda {

struct ChainCompiler {
  /// Makes ready what the calls of a step need, before they are captured.
  void (*prepare)(std::span<const graphs::Instruction> calls);
  /// Why there can be no chains; empty if there can.
  std::string (*problem)();
};
/// Called as the library loads.
void set_chain_compiler(ChainCompiler compiler);

}  // namespace vt::cuda
