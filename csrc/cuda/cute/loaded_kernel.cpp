#include "cuda/cute/loaded_kernel.h"

#include <dlfcn.h>

#include "cuda/sync.h"

namespace vt::cuda::cute {
namespace {

void* symbol(void* handle, const std::string& library, const std::string& name) {
  void* found = dlsym(handle, name.c_str());
  if (!found) fail(ErrorKind::Value, library, " does not hold ", name, ": build it again");
  return found;
}

}  // namespace

OpenedCode open_code(const std::string& library, const std::string& entry, const std::string& init,
                     const std::string& load) {
  // Nothing may be missing at the first launch, and its names are nobody else's.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* why = dlerror();
    fail(ErrorKind::Runtime, "the CuTe objects of ", library,
         " cannot be loaded: ", why ? why : "");
  }
  return {reinterpret_cast<Entry>(symbol(handle, library, entry)),
          reinterpret_cast<Module::Step>(symbol(handle, library, init)),
          reinterpret_cast<Module::Step>(symbol(handle, library, load))};
}

LoadedKernel::LoadedKernel(std::string name, std::vector<std::string> extents,
                           std::vector<std::string> tensors, std::vector<ScalarType> scalars)
    : name_(std::move(name)),
      extents_(std::move(extents)),
      tensors_(std::move(tensors)),
      scalars_(std::move(scalars)) {
  if (extents_.size() > kMaxExtents || tensors_.size() > kMaxTensors ||
      scalars_.size() > kMaxScalars)
    fail(ErrorKind::Value, name_, ": a CuTe kernel takes at most ", kMaxExtents, " extents, ",
         kMaxTensors, " tensors and ", kMaxScalars, " numbers, not ", extents_.size(), ", ",
         tensors_.size(), " and ", scalars_.size());
  for (const std::string& e : extents_) extent_names_.push_back(e.c_str());
  for (const std::string& t : tensors_) tensor_names_.push_back(t.c_str());
}

void LoadedKernel::add(std::string name, std::vector<ExtentRule> extents,
                       std::vector<TensorRule> tensors, OpenedCode code) {
  if (extents.size() != extents_.size() || tensors.size() != tensors_.size())
    fail(ErrorKind::Value, name_, " ", name, ": a rule is wanted for each of ", extents_.size(),
         " extents and ", tensors_.size(), " tensors");
  for (const TensorRule& rule : tensors) {
    for (int d = 0; d < rule.dims; ++d) {
      if (rule.extents[d] >= extents_.size())
        fail(ErrorKind::Value, name_, " ", name, ": a tensor's dimension has no extent");
    }
  }
  LoadedVariant& made = variants_.emplace_back();
  made.name = std::move(name);
  made.extents = std::move(extents);
  made.tensors = std::move(tensors);
  made.code = code;
}

std::string LoadedKernel::refusal(const LoadedVariant& v, Refusal refusal, const Call& call) const {
  return str(
      v.name, ": ",
      describe(refusal, v.extents.data(), v.tensors.data(), call, extent_names_, tensor_names_));
}

const char* LoadedKernel::launch(const Call& call, const Launch& on, std::string& why) {
  const DeviceProperties& gpu = on.properties();
  if (!runs_on(gpu.major, gpu.minor)) {
    why = "it is compiled for compute capability 9.0 only";
    return nullptr;
  }
  why = "nothing was compiled";
  for (LoadedVariant& v : variants_) {
    Refusal no = check_call(v.extents.data(), v.tensors.data(), call);
    if (!no && !v.module.ready(on.device(), v.code.init, v.code.load, v.name.c_str()))
      no = {Reason::NotLoaded, -1};
    if (no) {
      why = refusal(v, no, call);
      continue;
    }
    const auto error = static_cast<cudaError_t>(
        enter_packed(v.code.entry, v.tensors.data(), scalars_, call, on.stream()));
    if (error != cudaSuccess) [[unlikely]]
      check_cuda(error, str("launching the CuTe kernel ", name_, " ", v.name));
    wait_if_blocking(on.stream());
    return v.name.c_str();
  }
  return nullptr;
}

}  // namespace vt::cuda::cute
