#include "cuda/nvrtc.h"

#include <memory>
#include <vector>

#include "cuda/error.h"
#include "cuda/library.h"

namespace vt::cuda {
namespace {

// The part of NVRTC's binary interface that is used here.
using Result = int;
using Program = void*;

struct Api {
  Library library{"nvrtc", "libnvrtc.so.13", "nvidia-cuda-nvrtc"};
  const char* (*error_string)(Result);
  Result (*version)(int* major, int* minor);
  Result (*create)(Program*, const char* source, const char* name, int headers,
                   const char* const* header_sources, const char* const* header_names);
  Result (*destroy)(Program*);
  Result (*compile)(Program, int count, const char* const* options);
  Result (*log_size)(Program, size_t*);
  Result (*log)(Program, char*);
  Result (*cubin_size)(Program, size_t*);
  Result (*cubin)(Program, char*);

  Api() {
    library.bind(error_string, "nvrtcGetErrorString");
    library.bind(version, "nvrtcVersion");
    library.bind(create, "nvrtcCreateProgram");
    library.bind(destroy, "nvrtcDestroyProgram");
    library.bind(compile, "nvrtcCompileProgram");
    library.bind(log_size, "nvrtcGetProgramLogSize");
    library.bind(log, "nvrtcGetProgramLog");
    library.bind(cubin_size, "nvrtcGetCUBINSize");
    library.bind(cubin, "nvrtcGetCUBIN");
  }
};

const Api& api() {
  static constinit OpenedOnce<Api> instance;
  return instance.get();
}

void check_result(Result result, std::string_view what) {
  check(result == 0, "NVRTC error: ", result == 0 ? "" : api().error_string(result), " while ",
        what);
}

/// A text or binary whose size is asked for first; the size counts a final zero of texts.
std::string fetch(Program program, Result (*size_of)(Program, size_t*),
                  Result (*get)(Program, char*), std::string_view what) {
  size_t size = 0;
  check_result(size_of(program, &size), what);
  std::string out(size, '\0');
  if (size > 0) check_result(get(program, out.data()), what);
  return out;
}

}  // namespace

CompiledCode nvrtc_compile(const std::string& source, const std::string& name,
                           const std::string& architecture, std::span<const std::string> options) {
  Program program = nullptr;
  check_result(api().create(&program, source.c_str(), name.c_str(), 0, nullptr, nullptr),
               "creating a program");
  const std::unique_ptr<Program, void (*)(Program*)> owner(&program,
                                                           [](Program* p) { api().destroy(p); });
  const std::string target = "--gpu-architecture=" + architecture;
  std::vector<const char*> all{target.c_str()};
  for (const std::string& option : options) all.push_back(option.c_str());
  const Result result = api().compile(program, static_cast<int>(all.size()), all.data());
  CompiledCode out;
  out.log = fetch(program, api().log_size, api().log, "reading the log");
  while (!out.log.empty() && (out.log.back() == '\0' || out.log.back() == '\n')) out.log.pop_back();
  check(result == 0, "NVRTC error: ", result == 0 ? "" : api().error_string(result),
        " while compiling ", name, " for ", architecture, ":\n", out.log);
  out.cubin = fetch(program, api().cubin_size, api().cubin, "reading machine code");
  return out;
}

std::string nvrtc_version() {
  int major = 0, minor = 0;
  check_result(api().version(&major, &minor), "asking for the version");
  return str(major, ".", minor);
}

std::string architecture_of(int device) {
  const DeviceProperties& p = properties(device);
  // Hopper and later have instructions of their own in the variant "a".
  return str("sm_", p.major, p.minor, p.major >= 9 ? "a" : "");
}

Module::Module(const std::string& cubin) {
  check_cuda(cudaLibraryLoadData(&library_, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
             "loading machine code");
}
Module::~Module() {
  if (library_) cudaLibraryUnload(library_);
}
cudaKernel_t Module::kernel(const std::string& name) const {
  cudaKernel_t kernel = nullptr;
  check_cuda(cudaLibraryGetKernel(&kernel, library_, name.c_str()),
             str("finding the kernel ", name));
  return kernel;
}

void launch(cudaKernel_t kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments,
            Stream stream) {
  const DeviceGuard guard(stream.device);
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                              shared_bytes, stream.handle),
             "launching a kernel");
}

}  // namespace vt::cuda
