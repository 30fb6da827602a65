// Code of variants that were not compiled into this library, made while the program runs: asked for
// by VT_CUTE_JIT=1, where the CuTe DSL is installed (cute_kernels/just_in_time.py). Off otherwise.
#pragma once

#include <functional>
#include <optional>

#include "cuda/cute/loaded_kernel.h"

namespace vt::cuda::cute {

/// Compiles a variant, or finds it on disk; nothing where that is not possible, which it tells.
using Compiler = std::function<std::optional<OpenedCode>(const char* kernel, const char* variant)>;

/// From now on missing variants are compiled as they are chosen, outside of captures.
void set_compiler(Compiler compiler);
/// Whether they are.
bool compiles_late();

struct LateCode {
  OpenedCode code;
  Module module;
};

/// Whether a variant without code of its own may be chosen: it has late code, or may get some now.
bool late_usable(size_t kernel, size_t variant);
/// The late code of a variant, compiled now if need be; null where there is none and never will be.
LateCode* late_code(size_t kernel, size_t variant);

}  // namespace vt::cuda::cute
