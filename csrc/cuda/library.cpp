#include "cuda/library.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <string_view>

#include "core/error.h"
#include "core/library_folder.h"

namespace vt::cuda {
namespace {

std::atomic<LibraryFinder> finder{nullptr};

}  // namespace

void set_library_finder(LibraryFinder f) { finder = f; }

std::string Library::open(const char* name, const char* file) {
  std::string problem;
  const auto attempt = [&](const std::string& path, int extra) {
    if (handle_) return;
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | extra);
    if (!handle_) {
      // Of a library that is there, but cannot be loaded, the first is told.
      const char* reason = dlerror();
      if (extra == 0 && problem.empty() && reason && !says_missing(reason, path)) problem = reason;
      return;
    }
    path_ = path;
    // The loader knows where it found a bare file name.
    link_map* map = nullptr;
    if (dlinfo(handle_, RTLD_DI_LINKMAP, &map) == 0 && map && map->l_name && *map->l_name)
      path_ = map->l_name;
  };
  attempt(file, RTLD_NOLOAD);
  // site-packages/vibetensor/lib and site-packages/nvidia/…/lib are neighbours.
  for (const char* package : {"cu13", "cudnn", "nccl"})
    attempt(str(library_folder(), "/../../nvidia/", package, "/lib/", file), 0);
  if (const LibraryFinder find = finder; !handle_ && find) {
    const std::string path = find(name);
    if (!path.empty()) attempt(path, 0);
  }
  attempt(file, 0);
  return problem;
}

Library::Library(const char* name, const char* file, const char* package) {
  const std::string problem = open(name, file);
  if (handle_) return;
  if (!problem.empty()) {
    fail(file, " is installed but cannot be loaded: ", problem,
         ". Install it anew, with what it needs, with: pip install --force-reinstall ", package);
  }
  fail(file, " was not found. Install it with: pip install ", package,
       "  (or everything at once: pip install 'vibetensor[cuda13]').");
}

void Library::open_if_found(const char* name, const char* file) {
  Library quiet;
  quiet.open(name, file);
}

void* Library::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  check(address != nullptr, path_, " has no symbol ", name, "; it is too old for this build");
  return address;
}

}  // namespace vt::cuda
