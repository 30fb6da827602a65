// Python call stacks as contexts of allocations. Equal stacks are one object, which lives as long
// as an allocation or a recorded event refers to it.
#pragma once

#include <nanobind/nanobind.h>

#include <unordered_map>

#include "cuda/allocator/block.h"

namespace vt::cuda {

/// The calling thread's Python stack, innermost frame first and at most 256 frames; null on a
/// thread that runs no Python. Takes the GIL where the thread has let go of it, so the caller must
/// hold no lock that a thread with the GIL may wait for.
AllocationContext capture_python_stack() noexcept;
/// The same where the thread holds the GIL already, else null: never waits.
AllocationContext capture_python_stack_if_held() noexcept;
/// From now on nothing is captured: the interpreter is about to end.
void stop_capturing() noexcept;
/// Distinct stacks that are kept, for tests. Needs the GIL.
size_t captured_stacks();

/// Contexts as Python objects: lists of {"filename", "line", "name"}, one object a distinct stack
/// and one a distinct frame, so that a pickle holds each once. Needs the GIL.
class FrameLists {
 public:
  nanobind::object of(const AllocationContext& context);

 private:
  nanobind::object frame(PyObject* code, int line);

  std::unordered_map<const void*, nanobind::list> lists_;
  std::unordered_map<PyObject*, std::unordered_map<int, nanobind::dict>> frames_;
  nanobind::list none_;
};

}  // namespace vt::cuda
