#include "core/nvtx.h"

#include <dlfcn.h>

#include <mutex>

namespace vt::nvtx {
namespace {

struct Functions {
  int (*push)(const char*) = nullptr;
  int (*pop)() = nullptr;
  uint64_t (*start)(const char*) = nullptr;
  void (*end)(uint64_t) = nullptr;
  void (*mark)(const char*) = nullptr;
};
std::atomic<const Functions*> functions{nullptr};

template <class F>
bool find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::atomic<bool> ops_marked{false};

bool open(const std::string& path) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (is_open()) return true;
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return false;
  Functions found;
  const bool all =
      find(library, "nvtxRangePushA", found.push) && find(library, "nvtxRangePop", found.pop) &&
      find(library, "nvtxRangeStartA", found.start) && find(library, "nvtxRangeEnd", found.end) &&
      find(library, "nvtxMarkA", found.mark);
  if (!all) {
    dlclose(library);
    return false;
  }
  // For the rest of the process, as is the library: ranges may end while it exits.
  functions.store(new Functions(found), std::memory_order_release);
  return true;
}

bool is_open() { return functions.load(std::memory_order_acquire) != nullptr; }

int push(const char* name) {
  const Functions* const all = functions.load(std::memory_order_acquire);
  return all ? all->push(name) : -1;
}
int pop() {
  const Functions* const all = functions.load(std::memory_order_acquire);
  return all ? all->pop() : -1;
}
uint64_t start(const char* name) {
  const Functions* const all = functions.load(std::memory_order_acquire);
  return all ? all->start(name) : 0;
}
void end(uint64_t range) {
  if (const Functions* const all = functions.load(std::memory_order_acquire)) all->end(range);
}
void mark(const char* name) {
  if (const Functions* const all = functions.load(std::memory_order_acquire)) all->mark(name);
}

}  // namespace vt::nvtx
