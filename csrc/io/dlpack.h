// DLPack exchange: zero-copy tensors between libraries through a capsule.
// Format: https://dmlc.github.io/dlpack/latest/ (versions 0.8 and 1.x).
#pragma once

#include "core/tensor.h"

struct _object;  // PyObject

namespace vt::io {

/// A "dltensor" (or, versioned, "dltensor_versioned") capsule over `tensor`. Needs the GIL.
_object* to_dlpack_capsule(const Tensor& tensor, bool versioned, bool copied);
/// Takes over a capsule's tensor and renames the capsule as used. Needs the GIL.
Tensor from_dlpack_capsule(_object* capsule);

}  // namespace vt::io
