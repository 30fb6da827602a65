// Python.h under the limited API (one binary for CPython 3.10 and later), and owning references.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <utility>

#include "core/error.h"

namespace vt::python {

/// An owned reference.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(const Object& other) : object_(other.object_) { Py_XINCREF(object_); }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  static Object borrow(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Object(borrowed);
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

/// Thrown where the Python error indicator is already set.
struct PythonError {};

/// The result of a C API call, or PythonError.
inline PyObject* checked(PyObject* result) {
  if (!result) throw PythonError();
  return result;
}
inline Object own(PyObject* result) { return Object(checked(result)); }

/// Turns the C++ exception in flight into a Python one. Returns null.
PyObject* raise_current() noexcept;
/// The Python error in flight as a C++ exception that can cross threads and the engine; the
/// original exception object is kept and raised again by raise_current.
[[noreturn]] void throw_python_error();
/// Adds a note to the Python exception in flight (inside a catch block); false if it is another.
bool add_note_to_python_error(const std::string& note);

template <class F>
PyObject* guarded(F&& f) noexcept {
  try {
    return f();
  } catch (...) {
    return raise_current();
  }
}

inline PyObject* none() { return (Py_INCREF(Py_None), Py_None); }
inline PyObject* new_reference(PyObject* object) {
  Py_INCREF(object);
  return object;
}

/// Whether this thread, one that Python knows, has let go of the GIL. The limited API cannot be
/// asked.
inline thread_local bool gil_released = false;

/// Lets other threads run during work that is long enough to matter (`work` in elements).
class ReleaseGil {
 public:
  explicit ReleaseGil(int64_t work) {
    if (work < kWorthwhile) return;
    state_ = PyEval_SaveThread();
    gil_released = true;
  }
  ~ReleaseGil() { reacquire(); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;
  void reacquire() {
    if (!state_) return;
    PyEval_RestoreThread(std::exchange(state_, nullptr));
    gil_released = false;
  }
  static constexpr int64_t kWorthwhile = 20000;

 private:
  PyThreadState* state_ = nullptr;
};

/// Holds the GIL for a scope on any thread.
class AcquireGil {
 public:
  AcquireGil() : state_(PyGILState_Ensure()), was_released_(std::exchange(gil_released, false)) {}
  ~AcquireGil() {
    gil_released = was_released_;
    PyGILState_Release(state_);
  }
  AcquireGil(const AcquireGil&) = delete;
  AcquireGil& operator=(const AcquireGil&) = delete;

 private:
  PyGILState_STATE state_;
  bool was_released_;
};

/// Dropping a Python reference from a thread that may not hold the GIL.
inline void release_anywhere(PyObject* object) {
  if (!object) return;
  const AcquireGil gil;
  Py_DECREF(object);
}

template <class F>
PyCFunction as_cfunction(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace vt::python
