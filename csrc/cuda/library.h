// NVIDIA's libraries (cuBLASLt, cuDNN, NVRTC, NCCL) are opened when first needed: one already
// loaded in the process, the one in its nvidia-* package, or the system's.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "core/host_wait.h"

namespace vt::cuda {

/// Maps a library's short name ("cublasLt") to a path, or to nothing. Set by the Python package,
/// which knows where packages are installed.
using LibraryFinder = std::string (*)(const char* name);
void set_library_finder(LibraryFinder finder);

/// Stays open until the process ends.
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
  /// Returns why one that is there could not be loaded; empty where it was, or where there is none.
  std::string open(const char* name, const char* file);

  void* handle_ = nullptr;
  std::string path_;
};

/// An object of the whole process that opens a library, made at its first use. No lock is held
/// meanwhile: finding a library runs Python, so a thread may have to wait for another that has the
/// GIL, which must not in turn wait for this object. Of two made at the same time the first stays.
template <class T>
class OpenedOnce {
 public:
  const T& get() {
    if (const T* made = made_.load(std::memory_order_acquire)) [[likely]]
      return *made;
    return make();
  }

 private:
  [[gnu::noinline]] const T& make() {
    const HostWait waiting;  // large libraries take seconds
    auto fresh = std::make_unique<const T>();
    const T* first = nullptr;
    if (made_.compare_exchange_strong(first, fresh.get())) first = fresh.release();
    return *first;
  }

  std::atomic<const T*> made_{nullptr};
};

}  // namespace vt::cuda
