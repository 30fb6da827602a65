// Runs graphs backward.
#pragma once

#include "autograd/node.h"

namespace vt::autograd {

struct BackwardOptions {
  bool retain_graph = false;
  bool create_graph = false;
  bool allow_unused = false;
};

/// torch.autograd.backward: accumulates into the leaves (only those in `inputs` if any are given).
void backward(TensorSpan roots, TensorSpan gradients, TensorSpan inputs,
              const BackwardOptions& options);
/// torch.autograd.grad: gradients of `roots` with respect to `inputs`; leaves are not touched.
std::vector<Tensor> grad(TensorSpan roots, TensorSpan gradients, TensorSpan inputs,
                         const BackwardOptions& options);
/// True while this thread runs a backward.
bool in_backward();
/// And one that leaves out other leaves: that of grad(), or of backward() with inputs.
bool in_backward_for_inputs();

}  // namespace vt::autograd
