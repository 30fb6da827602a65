// C++ exceptions to Python ones and back.
#include <memory>
#include <new>
#include <string>

#include "python/python.h"

namespace vt::python {

PyObject* out_of_memory_error = nullptr;

namespace {

/// A Python exception travelling through C++ (out of a hook, through the engine, on any thread).
class CarriedPythonError : public Error {
 public:
  CarriedPythonError(PyObject* type, PyObject* value, PyObject* traceback, std::string message)
      : Error(ErrorKind::Runtime, std::move(message)), parts_(new Parts{type, value, traceback}) {}
  CarriedPythonError(const CarriedPythonError&) = default;
  void add_note(const std::string& note) const {
    const AcquireGil gil;
    // Python 3.10 has no notes; there the exception stays as it was raised.
    const Object added(PyObject_CallMethod(parts_->value, "add_note", "s", note.c_str()));
    if (!added) PyErr_Clear();
  }
  void restore() const {
    Py_XINCREF(parts_->type);
    Py_XINCREF(parts_->value);
    Py_XINCREF(parts_->traceback);
    PyErr_Restore(parts_->type, parts_->value, parts_->traceback);
  }

 private:
  struct Parts {
    PyObject* type;
    PyObject* value;
    PyObject* traceback;
    ~Parts() {
      const AcquireGil gil;
      Py_XDECREF(type);
      Py_XDECREF(value);
      Py_XDECREF(traceback);
    }
  };
  std::shared_ptr<Parts> parts_;
};

PyObject* python_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::Runtime:
      return PyExc_RuntimeError;
    case ErrorKind::Value:
      return PyExc_ValueError;
    case ErrorKind::Index:
      return PyExc_IndexError;
    case ErrorKind::Type:
      return PyExc_TypeError;
    case ErrorKind::NotImplemented:
      return PyExc_NotImplementedError;
    case ErrorKind::OutOfMemory:
      return out_of_memory_error ? out_of_memory_error : PyExc_MemoryError;
    case ErrorKind::Memory:
      return PyExc_MemoryError;
    case ErrorKind::Overflow:
      return PyExc_OverflowError;
    case ErrorKind::ZeroDivision:
      return PyExc_ZeroDivisionError;
    case ErrorKind::Attribute:
      return PyExc_AttributeError;
  }
  return PyExc_RuntimeError;
}

}  // namespace

PyObject* raise_current() noexcept {
  try {
    throw;
  } catch (const PythonError&) {
    // Already set.
  } catch (const CarriedPythonError& error) {
    error.restore();
  } catch (const Error& error) {
    PyErr_SetString(python_class(error.kind()), error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception");
  }
  return nullptr;
}

bool add_note_to_python_error(const std::string& note) {
  try {
    throw;
  } catch (const CarriedPythonError& error) {
    error.add_note(note);
    return true;
  } catch (...) {
    return false;
  }
}

void throw_python_error() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  std::string message = "Python error";
  if (value) {
    const Object text(PyObject_Str(value));
    const char* data = text ? PyUnicode_AsUTF8AndSize(text.get(), nullptr) : nullptr;
    if (data) message = data;
    PyErr_Clear();
  }
  throw CarriedPythonError(type, value, traceback, std::move(message));
}

}  // namespace vt::python
