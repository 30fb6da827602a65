// The CuTe kernels compiled into this library, and how they are launched.
//
//   if (cute::considered<cute::LayerNormForward>()) {
//     cute::LayerNormForward a;
//     ...  // extents, tensors, numbers
//     if (cute::launch(a, on)) return;
//   }
//   ...    // the library's own kernel
//
// The argument structures (cuda/cute/arguments.h) and the table behind kernels() are generated from
// cute_kernels/. Without the CuTe DSL at build time the table has contracts and no code.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>
#include <string>

#include "cuda/cute/select.h"
#include "cuda/kernels/launch.cuh"

namespace vt::cuda::cute {

/// A variant's code on the devices it was loaded on. Loading is lazy and happens once a device; one
/// that fails is remembered and told once, and the variant is not used there.
class Module {
 public:
  using Step = void (*)(void**);
  bool ready(int device, Step init, Step load, const char* name);

 private:
  cudaError_t run(int device, Step init, Step load);
  bool bring(int device, Step init, Step load, const char* name);

  std::mutex mutex_;
  cudaLibrary_t library_ = nullptr;
  bool initialised_ = false, broken_ = false;
  std::atomic<uint64_t> ready_{0};  // bit: device
  std::atomic<uint64_t> failed_{0};
};

struct Variant {
  const char* name;
  const ExtentRule* extents;
  const TensorRule* tensors;
  int32_t (*enter)(const Call& call, cudaStream_t stream);  // null: not compiled in
  Module::Step init, load;
  Module* module;
};

struct Kernel {
  const char* name;
  std::span<const char* const> extent_names, tensor_names, scalar_names;
  std::span<const ScalarType> scalar_types;
  std::span<const Variant> variants;
  std::span<const TunedRow> tuned;
  ProductModel model;
};

// Generated.
std::span<const Kernel> kernels();
std::span<const char* const> tuned_gpus();
/// The DSL's version; empty where nothing was compiled.
const char* compiled_by();

/// The objects hold code for Hopper alone.
bool runs_on(int major, int minor);

Mode mode();
void set_mode(Mode mode);

/// Whether a call of this kernel may end in a CuTe kernel (or must tell that it does not): all that
/// is asked where nothing was measured.
bool considered(int kernel);

/// What a call gets on a GPU of this name, capability and size, without launching it. It has code
/// then: a pass that asks before a step is lowered finds it there.
Choice chosen(const Kernel& kernel, const Call& call, std::string_view gpu, int major, int minor,
              int multiprocessors);

/// Launches the chosen variant; false where there is none. A launch that fails throws.
bool launch(int kernel, const Call& call, const Launch& on);
/// Launches this variant whatever the table says; throws where it does not apply.
void launch_variant(const Kernel& kernel, size_t variant, const Call& call, const Launch& on);

template <class Arguments>
bool considered() {
  return considered(Arguments::kIndex);
}
template <class Arguments>
bool launch(const Arguments& arguments, const Launch& on) {
  const auto values = arguments.values();
  return launch(Arguments::kIndex, values.call(), on);
}

}  // namespace vt::cuda::cute
