// What a captured function found in Python's objects - attributes of modules, options of optimizers,
// which tensors are registered where - and whether it is still so. Looking at everything costs
// microseconds; most of it lies in objects that count their changes, and is looked at only when the
// count has moved.
#pragma once

#include <cstdint>
#include <vector>

#include "python/python.h"

namespace vt::python {

/// The same object; or numbers, strings and tuples of such that are of one type and equal, floats bit
/// for bit. Runs no Python code.
bool same_value(PyObject* a, PyObject* b);

/// Where an entry of a watched dictionary is a learning rate: any float or int will do.
extern PyObject* rate_marker;

class Watch {
 public:
  /// These entries of a dictionary, which has no others but `ignored` ones (a set of keys).
  /// `counted`: note_change() follows every change of it.
  void add_dict(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted);
  /// The items of a list as they are now.
  void add_list(PyObject* list);
  /// An attribute's value.
  void add_attribute(PyObject* object, PyObject* name, PyObject* value);
  /// Whether everything is as it was. Sets no Python error unless it throws PythonError.
  bool holds();

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Dict {
    Object dict, ignored;
    std::vector<Object> keys, values;

    bool holds() const;
    bool holds_in_any_order() const;
  };
  struct List {
    Object list;
    std::vector<Object> items;

    bool holds() const;
  };
  struct Attribute {
    Object object, name, value;

    bool holds() const;
  };

  std::vector<Dict> dicts_, counted_;
  std::vector<List> lists_;
  std::vector<Attribute> attributes_;
  uint64_t seen_ = 0;  // the count of changes when the counted ones held last
};

}  // namespace vt::python
