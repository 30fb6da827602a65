#include "cuda/library.h"

#include <dlfcn.h>

#include <atomic>

#include "core/error.h"
#include "core/library_folder.h"

namespace vt::cuda {
namespace {

std::atomic<LibraryFinder> finder{nullptr};

}  // namespace

void set_library_finder(LibraryFinder f) { finder = f; }

Library::Library(const char* name, const char* file, const char* package) {
  const auto open = [&](const std::string& path, int extra) {
    if (handle_) return;
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | extra);
    if (handle_) path_ = path;
  };
  open(file, RTLD_NOLOAD);
  // site-packages/vibetensor/lib and site-packages/nvidia/cu13/lib are neighbours.
  open(str(library_folder(), "/../../nvidia/cu13/lib/", file), 0);
  if (const LibraryFinder find = finder; !handle_ && find) {
    const std::string path = find(name);
    if (!path.empty()) open(path, 0);
  }
  open(file, 0);
  if (handle_) return;
  const char* reason = dlerror();
  fail(file, " was not found. Install it with: pip install ", package,
       "  (or everything at once: pip install 'vibetensor[cuda13]'). The loader says: ",
       reason ? reason : "nothing");
}

void* Library::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  check(address != nullptr, path_, " has no symbol ", name, "; it is too old for this build");
  return address;
}

}  // namespace vt::cuda
