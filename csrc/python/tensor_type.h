// The Python face of Tensor and of the small value types around it.
#pragma once

#include <string_view>
#include <vector>

#include "core/generator.h"
#include "core/tensor.h"
#include "python/python.h"

namespace vt::python {

/// A Python tensor. The impl knows its wrapper (weakly), so one tensor is one Python object while
/// anybody holds it.
struct PyTensor {
  PyObject_HEAD Tensor tensor;
  PyObject* dict;
  PyObject* weak_references;
};

extern PyTypeObject* tensor_type;
extern PyTypeObject* dtype_type;
extern PyTypeObject* device_type;
extern PyTypeObject* memory_format_type;
extern PyTypeObject* layout_type;
extern PyTypeObject* generator_type;
extern PyTypeObject* size_type;  // torch.Size, a tuple

inline bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == tensor_type || PyType_IsSubtype(Py_TYPE(object), tensor_type);
}
inline Tensor& tensor_of(PyObject* object) { return reinterpret_cast<PyTensor*>(object)->tensor; }

/// A new reference to the wrapper of `tensor` (None if undefined).
PyObject* wrap(const Tensor& tensor);
/// A new wrapper of the given type for a tensor that has none yet.
PyObject* wrap_as(PyTypeObject* type, const Tensor& tensor);
PyObject* wrap_dtype(DType dtype);
PyObject* wrap_device(Device device);
PyObject* wrap_memory_format(MemoryFormat format);
PyObject* wrap_generator(const Generator& generator);
PyObject* wrap_size(IntSpan sizes);
PyObject* wrap_ints(IntSpan values);

bool is_dtype(PyObject* object);
bool is_device(PyObject* object);
DType dtype_of(PyObject* object);
Device device_of(PyObject* object);
MemoryFormat memory_format_of(PyObject* object);
Generator generator_of(PyObject* object);

/// Register the types on the module. The tensor type takes the generated methods.
void add_value_types(PyObject* module);
void add_tensor_type(PyObject* module, std::vector<PyMethodDef>& op_methods);

// Hand-written method tables, merged into the tensor type.
extern PyMethodDef indexing_methods[];
extern PyMethodDef conversion_methods[];
extern PyMethodDef tensor_autograd_methods[];
extern PyGetSetDef tensor_properties[];
PyObject* tensor_get_item(PyObject* self, PyObject* index);
int tensor_set_item(PyObject* self, PyObject* index, PyObject* value);

}  // namespace vt::python
