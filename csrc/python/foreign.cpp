#include "python/foreign.h"

#include "dispatch/autocast.h"
#include "dispatch/thread_state.h"
#include "python/arguments.h"

namespace vt::python {
namespace {

class PyForeign final : public ForeignFunction {
 public:
  explicit PyForeign(PyObject* callable) : object_(new_reference(callable)) {}
  ~PyForeign() override {
    if (Py_IsInitialized()) release_anywhere(object_);
  }

  void call(TensorSpan writes, TensorSpan reads) const override {
    const AcquireGil gil;
    const NoGrad no_grad;
    const autocast::Off off;  // as in a replay, which is in nobody's region
    const Object function(callable());
    const Object changed = tuple_of(writes), read = tuple_of(reads);
    const Object result(
        PyObject_CallFunctionObjArgs(function.get(), changed.get(), read.get(), nullptr));
    if (!result) throw_python_error();
  }

  /// A new reference.
  PyObject* callable() const {
    if (!loose_) return new_reference(object_);
    PyObject* found = checked(PyObject_CallNoArgs(object_));
    if (found == Py_None) {
      Py_DECREF(found);
      fail("a foreign function outlived the capture it belongs to");
    }
    return found;
  }
  void loosen() const {
    if (loose_) return;
    PyObject* weak = checked(PyWeakref_NewRef(object_, nullptr));
    Py_DECREF(std::exchange(object_, weak));
    loose_ = true;
  }

 private:
  static Object tuple_of(TensorSpan tensors) {
    Object tuple = own(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
    for (size_t i = 0; i < tensors.size(); ++i) {
      PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), checked(wrap(tensors[i])));
    }
    return tuple;
  }

  mutable PyObject* object_;  // the callable, or a weak reference to it; with the GIL
  mutable bool loose_ = false;
};

}  // namespace

Ref<ForeignFunction> foreign_arg(PyObject* object) { return make_ref<PyForeign>(object); }

PyObject* foreign_callable(const ForeignFunction& function) {
  return static_cast<const PyForeign&>(function).callable();
}
void loosen_foreign(const ForeignFunction& function) {
  static_cast<const PyForeign&>(function).loosen();
}

}  // namespace vt::python
