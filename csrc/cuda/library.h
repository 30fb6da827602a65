// NVIDIA's libraries (cuBLASLt, cuDNN, NVRTC, NCCL) are opened when first needed: one already
// loaded in the process, the one in its nvidia-* package, or the system's.
#pragma once

#include <string>

namespace vt::cuda {

/// Maps a library's short name ("cublasLt") to a path, or to nothing. Set by the Python package,
/// which knows where packages are installed.
using LibraryFinder = std::string (*)(const char* name);
void set_library_finder(LibraryFinder finder);

class Library {
 public:
  /// Throws, naming the command that installs it, when the library cannot be found.
  Library(const char* name, const char* file, const char* package);
  /// Opens a library that another one will look for by file name. Quiet where it is missing.
  static void open_if_found(const char* name, const char* file);
  /// The address of a symbol; throws if the library lacks it.
  void* symbol(const char* name) const;
  template <class F>
  void bind(F*& function, const char* name) const {
    function = reinterpret_cast<F*>(symbol(name));
  }
  const std::string& path() const { return path_; }

 private:
  Library() = default;
  void open(const char* name, const char* file);

  void* handle_ = nullptr;
  std::string path_;
};

}  // namespace vt::cuda
