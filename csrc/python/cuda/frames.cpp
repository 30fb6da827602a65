#include "python/cuda/frames.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <span>
#include <unordered_set>
#include <vector>

namespace nb = nanobind;

namespace vt::cuda {
namespace {

constexpr size_t kMostFrames = 256;

struct Frame {
  PyObject* code;  // owned by the stack
  int line;
  friend bool operator==(const Frame&, const Frame&) = default;
};

struct Stack : std::enable_shared_from_this<Stack> {
  std::vector<Frame> frames;
  Stack* next_dead = nullptr;
};

struct Hash {
  using is_transparent = void;
  size_t operator()(std::span<const Frame> frames) const {
    size_t hash = frames.size();
    for (const Frame& frame : frames) {
      const size_t word = reinterpret_cast<uintptr_t>(frame.code) / 16 * 65599 +
                          static_cast<size_t>(static_cast<unsigned>(frame.line));
      hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
  size_t operator()(const Stack* stack) const { return (*this)(std::span(stack->frames)); }
};
struct Equal {
  using is_transparent = void;
  static std::span<const Frame> span(std::span<const Frame> frames) { return frames; }
  static std::span<const Frame> span(const Stack* stack) { return stack->frames; }
  template <class A, class B>
  bool operator()(const A& a, const B& b) const {
    return std::ranges::equal(span(a), span(b));
  }
};

/// Guarded by the GIL. Never destroyed.
std::unordered_set<Stack*, Hash, Equal>& known() {
  static auto* all = new std::unordered_set<Stack*, Hash, Equal>;
  return *all;
}

std::atomic<bool> stopped{false};
/// Stacks that nothing refers to any more. Their last reference may go on any thread and under any
/// lock, so they are only put here; the next holder of the GIL frees them.
std::atomic<Stack*> dead{nullptr};

void bury(Stack* stack) noexcept {
  stack->next_dead = dead.load(std::memory_order_relaxed);
  while (!dead.compare_exchange_weak(stack->next_dead, stack, std::memory_order_release,
                                     std::memory_order_relaxed)) {
  }
}

void free_dead() {
  Stack* stack = dead.exchange(nullptr, std::memory_order_acquire);
  while (stack) {
    const std::unique_ptr<Stack> gone(stack);
    stack = stack->next_dead;
    // Its place may have been taken by an equal stack captured since.
    const auto found = known().find(gone.get());
    if (found != known().end() && *found == gone.get()) known().erase(found);
    for (const Frame& frame : gone->frames) Py_DECREF(frame.code);
  }
}

void drop(std::vector<Frame>& frames) {
  for (const Frame& frame : frames) Py_DECREF(frame.code);
  frames.clear();
}

std::vector<Frame> walk() {
  static PyObject* const f_back = PyUnicode_InternFromString("f_back");
  std::vector<Frame> frames;
  frames.reserve(32);
  auto* frame = reinterpret_cast<PyObject*>(PyThreadState_GetFrame(PyThreadState_Get()));
  while (frame && frame != Py_None) {
    auto* const view = reinterpret_cast<PyFrameObject*>(frame);
    if (frames.size() < kMostFrames) {
      frames.push_back(
          {reinterpret_cast<PyObject*>(PyFrame_GetCode(view)), PyFrame_GetLineNumber(view)});
    }
    PyObject* const back = frames.size() < kMostFrames ? PyObject_GetAttr(frame, f_back) : nullptr;
    Py_DECREF(frame);
    frame = back;
  }
  Py_XDECREF(frame);
  return frames;
}

std::shared_ptr<Stack> intern(std::vector<Frame> frames) {
  if (frames.empty()) return nullptr;
  const auto found = known().find(std::span<const Frame>(frames));
  if (found != known().end()) {
    if (auto same = (*found)->weak_from_this().lock()) {
      drop(frames);
      return same;
    }
    known().erase(found);  // dead, and about to be freed
  }
  std::shared_ptr<Stack> fresh(new Stack, &bury);
  fresh->frames = std::move(frames);
  known().insert(fresh.get());
  return fresh;
}

/// With the GIL held. An allocation may happen while an exception is on its way, and a garbage
/// collection in the middle of one could run any code: both are kept apart.
AllocationContext capture() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  const int collecting = PyGC_Disable();
  AllocationContext context;
  try {
    free_dead();
    context = intern(walk());
  } catch (const std::bad_alloc&) {
    // The record is a convenience; the allocation it tells of must not fail for it.
  }
  if (collecting) PyGC_Enable();
  PyErr_Clear();
  PyErr_Restore(type, value, traceback);
  return context;
}

bool holds_gil() {
  // Not in the limited API, but in every CPython.
  static const auto check = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  return check && check();
}

bool runs_python() {
  return !stopped.load(std::memory_order_relaxed) && PyGILState_GetThisThreadState() != nullptr;
}

}  // namespace

AllocationContext capture_python_stack() noexcept {
  if (!runs_python()) return nullptr;
  const PyGILState_STATE state = PyGILState_Ensure();
  AllocationContext context = capture();
  PyGILState_Release(state);
  return context;
}

AllocationContext capture_python_stack_if_held() noexcept {
  return runs_python() && holds_gil() ? capture() : nullptr;
}

void stop_capturing() noexcept { stopped.store(true); }

size_t captured_stacks() {
  free_dead();
  return known().size();
}

nb::object FrameLists::frame(PyObject* code, int line) {
  nb::dict& dict = frames_[code][line];
  if (dict.size() == 0) {
    const nb::handle handle(code);
    dict["filename"] = handle.attr("co_filename");
    dict["line"] = line;
    dict["name"] = handle.attr("co_name");
  }
  return dict;
}

nb::object FrameLists::of(const AllocationContext& context) {
  if (!context) return none_;
  const auto [place, fresh] = lists_.try_emplace(context.get());
  if (fresh) {
    for (const Frame& f : static_cast<const Stack*>(context.get())->frames) {
      place->second.append(frame(f.code, f.line));
    }
  }
  return place->second;
}

}  // namespace vt::cuda
