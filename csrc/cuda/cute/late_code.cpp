#include "cuda/cute/late_code.h"

#include <memory>

#include "cuda/stream.h"

namespace vt::cuda::cute {
namespace {

/// One for each variant of the table. A place whose code could not be made is `failed`.
struct Place {
  std::atomic<LateCode*> code{nullptr};
  std::atomic<bool> failed{false};
};

struct Places {
  std::vector<std::unique_ptr<Place[]>> of;
  Places() {
    for (const Kernel& k : kernels()) of.push_back(std::make_unique<Place[]>(k.variants.size()));
  }
};

Place& place(size_t kernel, size_t variant) {
  static const Places* const places = new Places;
  return places->of[kernel][variant];
}

std::atomic<const Compiler*> compiler{nullptr};
std::mutex compiling;

}  // namespace

void set_compiler(Compiler function) {
  // The one before may be running: it is never freed.
  compiler.store(function ? new Compiler(std::move(function)) : nullptr, std::memory_order_release);
}

bool compiles_late() { return compiler.load(std::memory_order_relaxed) != nullptr; }

bool late_usable(size_t kernel, size_t variant) {
  if (!compiles_late()) [[likely]]
    return false;
  const Place& p = place(kernel, variant);
  if (p.code.load(std::memory_order_acquire)) return true;
  return !capturing() && !p.failed.load(std::memory_order_relaxed);
}

LateCode* late_code(size_t kernel, size_t variant) {
  Place& p = place(kernel, variant);
  if (LateCode* known = p.code.load(std::memory_order_acquire)) return known;
  const Compiler* const compile = compiler.load(std::memory_order_acquire);
  if (!compile || capturing() || p.failed.load(std::memory_order_relaxed)) return nullptr;
  const Kernel& k = kernels()[kernel];
  // Not under the lock: the compiler takes Python's, whose holder may come here. Of two threads
  // that are here at once the second waits in the compiler, and gets what the first left on disk.
  const std::optional<OpenedCode> made = (*compile)(k.name, k.variants[variant].name);
  const std::lock_guard lock(compiling);
  if (LateCode* known = p.code.load(std::memory_order_acquire)) return known;
  if (!made) {
    p.failed.store(true, std::memory_order_relaxed);
    return nullptr;
  }
  auto* fresh = new LateCode;
  fresh->code = *made;
  p.code.store(fresh, std::memory_order_release);
  return fresh;
}

}  // namespace vt::cuda::cute
