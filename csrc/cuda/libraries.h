// What `vibetensor info` says of NVIDIA's libraries.
#pragma once

#include <string>
#include <vector>

namespace vt::cuda {

struct LibraryReport {
  std::string name;
  std::string path, version;  // empty where it is missing
  std::string problem;        // how to install it; empty where it is found
};

/// Opens each library the backend can use: cuBLASLt, cuDNN, NVRTC, nvJitLink, NCCL.
std::vector<LibraryReport> library_reports();

}  // namespace vt::cuda
