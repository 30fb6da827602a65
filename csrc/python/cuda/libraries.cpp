#include "python/cuda/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "cuda/cudnn.h"
#include "cuda/libraries.h"
#include "cuda/nvrtc.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

/// Machine code with the launches that tests make: 64-bit arguments (pointers, integers).
class PythonModule {
 public:
  explicit PythonModule(const nb::bytes& cubin)
      : module_(std::string(cubin.c_str(), cubin.size())) {}
  void launch(const std::string& name, unsigned grid, unsigned block,
              std::vector<uint64_t> arguments, int device) const {
    std::vector<void*> pointers;
    for (uint64_t& argument : arguments) pointers.push_back(&argument);
    cuda::launch(module_.kernel(name), dim3(grid), dim3(block), 0, pointers.data(),
                 current_stream(device));
  }
  /// Median over `rounds` of the host's time for a launch without arguments, the device idle before
  /// each round of `calls`.
  double launch_seconds(const std::string& name, int calls, int rounds) const {
    using Clock = std::chrono::steady_clock;
    const cudaKernel_t kernel = module_.kernel(name);
    const Stream stream = current_stream(current_device());
    std::vector<double> seconds;
    for (int round = 0; round < rounds; ++round) {
      synchronize(stream);
      const auto start = Clock::now();
      for (int i = 0; i < calls; ++i) cuda::launch(kernel, dim3(1), dim3(1), 0, nullptr, stream);
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
    std::nth_element(seconds.begin(), seconds.begin() + rounds / 2, seconds.end());
    return seconds[static_cast<size_t>(rounds / 2)];
  }

 private:
  Module module_;
};

}  // namespace

void bind_libraries(nb::module_& m) {
  m.def("libraries", [] {
    nb::list out;
    for (const LibraryReport& r : library_reports())
      out.append(nb::make_tuple(r.name, r.version, r.path, r.problem));
    return out;
  });
  m.def("cudnn_available", &cudnn_available);
  m.def("cudnn_problem", &cudnn_problem);
  m.def("cudnn_version", &cudnn_version);
  m.def("cudnn_refusal", &cudnn_refusal);
  m.def("cudnn_runs", &cudnn_runs);
  m.def("nvrtc_compile",
        [](const std::string& source, const std::string& name, const std::string& architecture,
           const std::vector<std::string>& options) {
          CompiledCode code;
          {
            const nb::gil_scoped_release released;
            code = nvrtc_compile(source, name, architecture, options);
          }
          return nb::make_tuple(nb::bytes(code.cubin.data(), code.cubin.size()), code.log);
        });
  m.def("architecture_of", &architecture_of);
  nb::class_<PythonModule>(m, "Module")
      .def(nb::init<const nb::bytes&>())
      .def("launch", &PythonModule::launch)
      .def("launch_seconds", &PythonModule::launch_seconds);
}

}  // namespace vt::cuda
