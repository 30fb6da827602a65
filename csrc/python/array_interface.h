// Tensors over memory of other Python objects: NumPy's __array_interface__, and
// __cuda_array_interface__, by which Numba, CuPy and others hand over device memory.
#pragma once

#include "core/tensor.h"
#include "python/python.h"

namespace vt::python {

/// A tensor over foreign memory, which `keeper` keeps alive.
Tensor borrow(void* data, size_t nbytes, PyObject* keeper, bool writable, IntSpan sizes,
              IntSpan strides, DType dtype, Device device = {});

bool has_array_interface(PyObject* object);
Tensor from_array_interface(PyObject* object);

/// Whether `object` is a numpy.ndarray. False, at little cost, while NumPy is not imported.
bool is_ndarray(PyObject* object);
/// A tensor, on the default device, with a copy of an array of any strides; unsigned integers that
/// have no dtype here become int64.
Tensor copy_of_ndarray(PyObject* array);
/// torch.tensor(data).
Tensor new_tensor(PyObject* data);

bool has_cuda_array_interface(PyObject* object);
/// Work on the current stream comes after what the object's `stream` holds by now. The memory's
/// device is asked of the driver.
Tensor from_cuda_array_interface(PyObject* object);

}  // namespace vt::python
