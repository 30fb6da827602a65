// Convolutions and their gradients by cuDNN, in one to three dimensions (one as two).
#pragma once

#include "core/convolution.h"
#include "cuda/cudnn_graph.h"

namespace vt::cuda::cudnn {

/// Whether the library is there, switched on, and has a plan (which is made and kept).
bool has_convolution(ConvolutionProduct product, const Convolution& shape);

/// The plans of a convolution; empty if there are none. Several are to be measured.
Plans* convolution_plans(Context& context, ConvolutionProduct product, const Convolution& shape);

}  // namespace vt::cuda::cudnn
