// What a captured function found in Python's objects - attributes of modules, options of
// optimizers, which tensors are registered where - and whether it is still so. Looking at
// everything costs microseconds; most of it lies in objects that count their changes, and is looked
// at only when the count has moved.
#pragma once

#include <cstdint>
#include <vector>

#include "python/python.h"

namespace vt::python {

/// The same object; or numbers, strings and tuples of such that are of one type and equal, floats
/// bit for bit. Runs no Python code.
bool same_value(PyObject* a, PyObject* b);

/// Where an entry of a watched dictionary is a learning rate: any float or int will do.
extern PyObject* rate_marker;
/// Likewise, also in a tuple: any but 0.
extern PyObject* nonzero_marker;
/// Where a watched dictionary has no such entry.
extern PyObject* absent_marker;

class Watch {
 public:
  /// All entries of a dictionary in their order, but `ignored` ones (a set of keys, which may still
  /// grow).
  /// `counted`: note_change() follows every change of it.
  void add_dict(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted);
  /// Some entries of a dictionary; whatever else it has may change.
  void add_items(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted);
  /// The items of a list as they are now.
  void add_list(PyObject* list);
  /// An attribute's value; ABSENT where there is none.
  void add_attribute(PyObject* object, PyObject* name, PyObject* value, bool counted);
  /// Whether everything is as it was. Throws PythonError.
  bool holds();
  /// How many entries, items and attributes are looked at each time, and how many more after a
  /// counted change.
  size_t always() const;
  size_t counted() const;

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Dict {
    Object dict, ignored;
    bool whole;
    std::vector<Object> keys, values;

    bool ignores(PyObject* key) const;
    bool holds() const { return whole ? has_all() : has_items(); }
    bool has_all() const;
    bool has_items() const;
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

  void add(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted, bool whole);

  std::vector<Dict> dicts_, counted_;
  std::vector<List> lists_;
  std::vector<Attribute> attributes_, counted_attributes_;
  uint64_t seen_ = 0;  // the count of changes when the counted ones held last
};

}  // namespace vt::python
