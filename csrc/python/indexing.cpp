// x[...] and x[...] = v: Python's index expressions as select, slice, index and index_put_.
#include <cmath>

#include "autograd/front.h"
#include "python/arguments.h"
#include "python/array_interface.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace vt::python {
namespace {

/// What an index expression says, after views were taken: the viewed tensor and the tensor indices
/// (undefined where a dimension is taken whole).
struct Parsed {
  Tensor view;
  std::vector<Tensor> indices;
  bool has_tensor = false;
};

bool is_text(PyObject* object) { return PyUnicode_Check(object) || PyBytes_Check(object); }

/// A list (or another sequence) of numbers is one index; one that holds slices, tensors or
/// sequences is a tuple.
bool list_is_tuple(PyObject* list) {
  const Py_ssize_t n = PyList_Size(list);
  if (n >= 32) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyList_GetItem(list, i);
    if (is_tensor(item) || PySlice_Check(item) || item == Py_None || item == Py_Ellipsis ||
        (PySequence_Check(item) && !is_text(item))) {
      return true;
    }
  }
  return false;
}

/// An index that is neither number, slice, tensor, None nor `...`: an array or a sequence.
Tensor index_tensor(PyObject* item) {
  const bool array = is_ndarray(item);
  const bool sequence = array || (PySequence_Check(item) && !is_text(item));
  if (!sequence && !has_array_interface(item)) {
    fail(ErrorKind::Index,
         "only integers, slices (`:`), ellipsis (`...`), None and long or byte Variables are valid "
         "indices (got ",
         type_name(item), ")");
  }
  Tensor t;
  if (array) {
    t = copy_of_ndarray(item);
  } else {
    const bool list = !sequence || PyList_Check(item) || PyTuple_Check(item);
    const Object given = list ? Object::borrow(item) : own(PySequence_List(item));
    t = new_tensor(given.get());
  }
  // Nothing tells the dtype of an empty one.
  return t.numel() == 0 && is_floating(t.dtype()) ? ops::_to_dtype(t, DType::Int64) : t;
}

/// Dimensions of the tensor that this item uses up.
int64_t consumed(PyObject* item) {
  if (item == Py_None || item == Py_Ellipsis || PyBool_Check(item)) return 0;
  if (is_tensor(item)) {
    const Tensor& t = tensor_of(item);
    if (t.dtype() == DType::Bool || (t.dtype() == DType::UInt8 && t.dim() > 0)) return t.dim();
  }
  return 1;
}

std::optional<int64_t> slice_part(PyObject* slice, const char* name) {
  const Object part = own(PyObject_GetAttrString(slice, name));
  if (part.get() == Py_None) return std::nullopt;
  if (is_tensor(part.get())) return int_arg(part.get());
  const Object index = own(PyNumber_Index(part.get()));
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.get(), &overflow);
  if (overflow)
    return overflow > 0 ? std::numeric_limits<int64_t>::max()
                        : std::numeric_limits<int64_t>::min() / 2;
  return value;
}

Tensor apply_slice(const Tensor& t, int64_t dim, PyObject* slice) {
  const auto step = slice_part(slice, "step").value_or(1);
  check_value(step > 0, "step must be greater than zero");
  const auto start = slice_part(slice, "start"), stop = slice_part(slice, "stop");
  return ops::slice(t, dim, start, stop, step);
}

Tensor apply_select(const Tensor& t, int64_t dim, int64_t index, int64_t shown_dim) {
  check_index(
      t.dim() > 0,
      "invalid index of a 0-dim tensor. Use `tensor.item()` in Python to convert a 0-dim tensor "
      "to a number");
  const int64_t size = t.sizes()[dim];
  check_index(index >= -size && index < size, "index ", index, " is out of bounds for dimension ",
              shown_dim, " with size ", size);
  return ops::select(t, dim, index);
}

void note_tensor(Parsed& parsed, int64_t dim, const Tensor& index) {
  parsed.indices.resize(std::max<size_t>(parsed.indices.size(), static_cast<size_t>(dim) + 1));
  parsed.indices[dim] = index;
  parsed.has_tensor = true;
}

Parsed parse(const Tensor& self, PyObject* index) {
  Parsed parsed{self, {}, false};
  SmallVector<PyObject*, 8> items;
  std::vector<Object> made;  // keeps what is not in `index` itself
  if (!PyTuple_Check(index) && !PyList_Check(index) && !is_tensor(index) &&
      PySequence_Check(index) && !is_text(index) && !is_ndarray(index)) {
    made.push_back(own(PySequence_List(index)));  // range, deque, ...
    index = made.back().get();
  }
  if (PyTuple_Check(index)) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(index); ++i) items.push_back(PyTuple_GetItem(index, i));
  } else if (PyList_Check(index) && list_is_tuple(index)) {
    for (Py_ssize_t i = 0; i < PyList_Size(index); ++i) items.push_back(PyList_GetItem(index, i));
  } else {
    items.push_back(index);
  }
  // Sequences and arrays become tensors first, so that masks count their dimensions.
  for (PyObject*& item : items) {
    const bool known = is_tensor(item) || item == Py_None || item == Py_Ellipsis ||
                       PySlice_Check(item) || PyLong_Check(item);
    // An array has __index__ too, for when it holds one integer.
    if (known || (PyIndex_Check(item) && !is_ndarray(item))) continue;
    made.push_back(own(wrap(index_tensor(item))));
    item = made.back().get();
  }
  int64_t used = 0;
  for (PyObject* item : items) used += consumed(item);
  check_index(used <= self.dim(), "too many indices for tensor of dimension ", self.dim());
  int64_t dim = 0, shown = 0;
  for (PyObject* item : items) {
    if (item == Py_Ellipsis) {
      dim += self.dim() - used;
      shown += self.dim() - used;
    } else if (item == Py_None) {
      parsed.view = ops::unsqueeze(parsed.view, dim++);
    } else if (PySlice_Check(item)) {
      parsed.view = apply_slice(parsed.view, dim++, item);
      ++shown;
    } else if (PyBool_Check(item)) {
      parsed.view = ops::unsqueeze(parsed.view, dim);
      note_tensor(parsed, dim++,
                  ops::arange_start(Scalar(int64_t{0}), Scalar(int64_t{item == Py_True}), Scalar(1),
                                    DType::Int64, self.device()));
    } else if (is_tensor(item)) {
      const Tensor& t = tensor_of(item);
      if (t.dim() == 0 && is_integral(t.dtype())) {
        parsed.view = apply_select(parsed.view, dim, t.item().to_int(), shown++);
      } else if (t.dim() == 0 && t.dtype() == DType::Bool) {
        parsed.view = ops::unsqueeze(parsed.view, dim);
        note_tensor(parsed, dim++,
                    ops::arange_start(Scalar(int64_t{0}), Scalar(int64_t{t.item().to_bool()}),
                                      Scalar(1), DType::Int64, self.device()));
      } else {
        check_index(!is_floating(t.dtype()),
                    "tensors used as indices must be long, int, byte or bool tensors");
        const int64_t n = consumed(item);
        note_tensor(parsed, dim, t);
        dim += n;
        shown += n;
        // A mask over n dimensions stands for n integer indices: index() expands it in place, so
        // the following items still count dimensions of the view.
        if (n > 1) parsed.indices.resize(static_cast<size_t>(dim) - static_cast<size_t>(n) + 1);
        if (n > 1) dim -= n - 1;
      }
    } else {
      const Object number = own(PyNumber_Index(item));
      parsed.view = apply_select(parsed.view, dim, int_arg(number.get()), shown++);
    }
  }
  return parsed;
}

Tensor get_item(const Tensor& self, PyObject* index) {
  if (PyLong_Check(index) && !PyBool_Check(index)) return apply_select(self, 0, int_arg(index), 0);
  if (PySlice_Check(index)) {
    check_index(self.dim() > 0, "slice() cannot be applied to a 0-dim tensor.");
    return apply_slice(self, 0, index);
  }
  const Parsed parsed = parse(self, index);
  if (parsed.has_tensor) return ops::index(parsed.view, parsed.indices);
  return parsed.view.is_same(self) ? ops::alias(self) : parsed.view;
}

/// Leading ones that the target lacks are dropped: x[0] = ones(1, 3) fits.
Tensor drop_leading_ones(const Tensor& value, int64_t dim) {
  Dims sizes(value.sizes());
  while (static_cast<int64_t>(sizes.size()) > dim && sizes[0] == 1) sizes.erase(0);
  return sizes.size() == value.sizes().size() ? value : ops::reshape(value, sizes);
}

/// A number that elements of `dtype` can hold.
Scalar element_arg(PyObject* value, DType dtype) {
  const Scalar number = scalar_arg(value);
  if (!is_floating(dtype)) check_fits(number, dtype);
  return number;
}

void set_item(const Tensor& self, PyObject* index, PyObject* value) {
  const Parsed parsed = parse(self, index);
  const bool number = !is_tensor(value) && is_number(value);
  if (!parsed.has_tensor && number) {
    const Tensor number = wrapped_scalar(element_arg(value, self.dtype()));
    // A number past the range of 16 bits becomes infinite, as in a tensor made of it.
    const bool past = is_reduced_float(self.dtype()) && std::abs(number.item().to_double()) > 65504;
    ops::fill_(parsed.view, past ? ops::_to_dtype(number, self.dtype()) : number);
    return;
  }
  Tensor source;
  if (number) {
    source = ops::_to_dtype(wrapped_scalar(element_arg(value, self.dtype())), self.dtype());
    source = alias(source);
  } else {
    source = is_tensor(value)    ? tensor_of(value)
             : is_ndarray(value) ? copy_of_ndarray(value)
                                 : new_tensor(value);
    if (!is_tensor(value) && self.device() != source.device())
      source = ops::copy_(vt::empty(source.sizes(), source.dtype(), self.device()), source, false);
  }
  if (!parsed.has_tensor) {
    source = drop_leading_ones(source, parsed.view.dim());
    // Expanded here: a row of the tensor may be written to all of it (x[:] = x[0]).
    if (!equal(source.sizes(), parsed.view.sizes()))
      source = ops::expand(source, parsed.view.sizes(), false);
    ops::copy_(parsed.view, source, false);
    return;
  }
  if (source.dtype() != self.dtype()) source = ops::_to_dtype(source, self.dtype());
  ops::index_put_(parsed.view, parsed.indices, source, false);
}

PyObject* method_get_item(PyObject* self, PyObject* index) { return tensor_get_item(self, index); }

}  // namespace

PyObject* tensor_get_item(PyObject* self, PyObject* index) {
  return guarded([&]() -> PyObject* { return wrap(get_item(tensor_of(self), index)); });
}
int tensor_set_item(PyObject* self, PyObject* index, PyObject* value) {
  try {
    check_type(value != nullptr, "Tensor does not support deleting items");
    set_item(tensor_of(self), index, value);
    return 0;
  } catch (...) {
    raise_current();
    return -1;
  }
}

PyMethodDef indexing_methods[] = {{"__getitem__", method_get_item, METH_O, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};

}  // namespace vt::python
