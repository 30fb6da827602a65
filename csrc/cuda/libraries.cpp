#include "cuda/libraries.h"

#include "core/error.h"
#include "cuda/library.h"

namespace vt::cuda {
namespace {

/// 130100 with `unit` 10000 is 13.1.0.
std::string dotted(int64_t number, int64_t unit, int64_t minor_unit) {
  return str(number / unit, ".", number % unit / minor_unit, ".", number % minor_unit);
}

std::string cublaslt_text(const Library& library) {
  size_t (*version)() = nullptr;
  library.bind(version, "cublasLtGetVersion");
  return dotted(static_cast<int64_t>(version()), 10000, 100);
}
std::string cudnn_text(const Library& library) {
  size_t (*version)() = nullptr;
  library.bind(version, "cudnnGetVersion");
  return dotted(static_cast<int64_t>(version()), 10000, 100);
}
std::string nccl_text(const Library& library) {
  int (*version)(int*) = nullptr;
  library.bind(version, "ncclGetVersion");
  int number = 0;
  return version(&number) == 0 ? dotted(number, 10000, 100) : std::string();
}
std::string nvrtc_text(const Library& library) {
  int (*version)(int*, int*) = nullptr;
  library.bind(version, "nvrtcVersion");
  int major = 0, minor = 0;
  return version(&major, &minor) == 0 ? str(major, ".", minor) : std::string();
}
std::string nvjitlink_text(const Library& library) {
  int (*version)(unsigned*, unsigned*) = nullptr;
  library.bind(version, "nvJitLinkVersion");
  unsigned major = 0, minor = 0;
  return version(&major, &minor) == 0 ? str(major, ".", minor) : std::string();
}

struct Entry {
  const char *title, *name, *file, *package;
  std::string (*version)(const Library&);
};
constexpr Entry kEntries[] = {
    {"cuBLASLt", "cublasLt", "libcublasLt.so.13", "nvidia-cublas", cublaslt_text},
    {"cuDNN", "cudnn", "libcudnn.so.9", "nvidia-cudnn-cu13", cudnn_text},
    {"NVRTC", "nvrtc", "libnvrtc.so.13", "nvidia-cuda-nvrtc", nvrtc_text},
    {"nvJitLink", "nvJitLink", "libnvJitLink.so.13", "nvidia-nvjitlink", nvjitlink_text},
    {"NCCL", "nccl", "libnccl.so.2", "nvidia-nccl-cu13", nccl_text},
};

}  // namespace

std::vector<LibraryReport> library_reports() {
  std::vector<LibraryReport> out;
  for (const Entry& entry : kEntries) {
    LibraryReport& report = out.emplace_back();
    report.name = entry.title;
    try {
      const Library library(entry.name, entry.file, entry.package);
      report.version = entry.version(library);
      report.path = library.path();
    } catch (const Error& error) {
      report.problem = error.what();
    }
  }
  return out;
}

}  // namespace vt::cuda
