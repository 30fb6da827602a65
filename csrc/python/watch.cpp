#include "python/watch.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>

namespace nb = nanobind;

namespace vt::python {

PyObject* rate_marker = nullptr;
PyObject* nonzero_marker = nullptr;
PyObject* absent_marker = nullptr;

namespace {

// Changes of what counts its changes. Only touched with the GIL held.
uint64_t changes = 1;

bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

bool same_items(PyObject* a, PyObject* b) {
  const Py_ssize_t n = PyTuple_Size(a);
  if (PyTuple_Size(b) != n) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!same_value(PyTuple_GetItem(a, i), PyTuple_GetItem(b, i))) return false;
  }
  return true;
}

bool same_or_rate(PyObject* found, PyObject* expected) {
  if (found == expected) return true;
  if (expected == rate_marker) return PyFloat_Check(found) || PyLong_CheckExact(found);
  if (expected == nonzero_marker) return PyFloat_Check(found) && PyFloat_AsDouble(found) != 0;
  if (!PyTuple_Check(found) || !PyTuple_Check(expected)) return same_value(found, expected);
  const Py_ssize_t n = PyTuple_Size(expected);
  if (PyTuple_Size(found) != n) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!same_or_rate(PyTuple_GetItem(found, i), PyTuple_GetItem(expected, i))) return false;
  }
  return true;
}

int visit_all(const std::vector<Object>& objects, visitproc visit, void* arg) {
  for (const Object& object : objects) Py_VISIT(object.get());
  return 0;
}

}  // namespace

bool same_value(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyFloat_Check(a)) return same_bits(PyFloat_AsDouble(a), PyFloat_AsDouble(b));
  if (PyLong_CheckExact(a) || PyUnicode_CheckExact(a) || PyBytes_CheckExact(a))
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  return PyTuple_Check(a) && same_items(a, b);
}

void Watch::add_dict(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted) {
  add(dict, entries, ignored, counted, true);
}

void Watch::add_items(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted) {
  add(dict, entries, ignored, counted, false);
}

void Watch::add(PyObject* dict, PyObject* entries, PyObject* ignored, bool counted, bool whole) {
  check_type(PyDict_Check(dict) && PyDict_Check(entries) && PyAnySet_Check(ignored),
             "a Watch expects two dicts and a set");
  Dict watched{Object::borrow(dict), Object::borrow(ignored), whole, {}, {}};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t place = 0; PyDict_Next(entries, &place, &key, &value);) {
    watched.keys.push_back(Object::borrow(key));
    watched.values.push_back(Object::borrow(value));
  }
  (counted ? counted_ : dicts_).push_back(std::move(watched));
  if (counted) seen_ = 0;
}

void Watch::add_list(PyObject* list) {
  check_type(PyList_Check(list), "Watch.add_list expects a list");
  List watched{Object::borrow(list), {}};
  for (Py_ssize_t i = 0; i < PyList_Size(list); ++i)
    watched.items.push_back(Object::borrow(PyList_GetItem(list, i)));
  lists_.push_back(std::move(watched));
}

void Watch::add_attribute(PyObject* object, PyObject* name, PyObject* value, bool counted) {
  (counted ? counted_attributes_ : attributes_)
      .push_back({Object::borrow(object), Object::borrow(name), Object::borrow(value)});
  if (counted) seen_ = 0;
}

bool Watch::Dict::ignores(PyObject* key) const {
  const int found = PySet_Contains(ignored.get(), key);
  if (found < 0) throw PythonError();
  return found == 1;
}

/// In one pass without a look-up. Order matters: modules run, and hooks are called, in it.
bool Watch::Dict::has_all() const {
  const size_t n = keys.size();
  size_t i = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t place = 0; PyDict_Next(dict.get(), &place, &key, &value);) {
    if (i < n && same_value(key, keys[i].get())) {
      if (!same_or_rate(value, values[i].get())) return false;
      ++i;
    } else if (!ignores(key)) {
      return false;
    }
  }
  return i == n;
}

bool Watch::Dict::has_items() const {
  for (size_t i = 0; i < keys.size(); ++i) {
    PyObject* now = PyDict_GetItemWithError(dict.get(), keys[i].get());
    if (!now && PyErr_Occurred()) throw PythonError();
    if (!same_or_rate(now ? now : absent_marker, values[i].get()) && !ignores(keys[i].get()))
      return false;
  }
  return true;
}

bool Watch::List::holds() const {
  const auto n = static_cast<Py_ssize_t>(items.size());
  if (PyList_Size(list.get()) != n) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (PyList_GetItem(list.get(), i) != items[static_cast<size_t>(i)].get()) return false;
  }
  return true;
}

bool Watch::Attribute::holds() const {
  const Object now(PyObject_GetAttr(object.get(), name.get()));
  if (now) return same_value(now.get(), value.get());
  // A closure's cell that is empty by now says ValueError.
  if (!PyErr_ExceptionMatches(PyExc_AttributeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
    throw PythonError();
  PyErr_Clear();
  return value.get() == absent_marker;
}

bool Watch::holds() {
  const auto holds = [](const auto& watched) { return watched.holds(); };
  if (!std::all_of(attributes_.begin(), attributes_.end(), holds) ||
      !std::all_of(dicts_.begin(), dicts_.end(), holds) ||
      !std::all_of(lists_.begin(), lists_.end(), holds))
    return false;
  if (seen_ == changes) return true;
  const uint64_t now = changes;
  if (!std::all_of(counted_.begin(), counted_.end(), holds) ||
      !std::all_of(counted_attributes_.begin(), counted_attributes_.end(), holds))
    return false;
  seen_ = now;
  return true;
}

size_t Watch::counted() const {
  size_t total = counted_attributes_.size();
  for (const Dict& d : counted_) total += d.keys.size();
  return total;
}

size_t Watch::always() const {
  size_t total = attributes_.size();
  for (const Dict& d : dicts_) total += d.keys.size();
  for (const List& l : lists_) total += l.items.size();
  return total;
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const auto* dicts : {&dicts_, &counted_}) {
    for (const Dict& d : *dicts) {
      Py_VISIT(d.dict.get());
      Py_VISIT(d.ignored.get());
      if (const int stop = visit_all(d.keys, visit, arg)) return stop;
      if (const int stop = visit_all(d.values, visit, arg)) return stop;
    }
  }
  for (const List& l : lists_) {
    Py_VISIT(l.list.get());
    if (const int stop = visit_all(l.items, visit, arg)) return stop;
  }
  for (const auto* attributes : {&attributes_, &counted_attributes_}) {
    for (const Attribute& a : *attributes) {
      Py_VISIT(a.object.get());
      Py_VISIT(a.name.get());
      Py_VISIT(a.value.get());
    }
  }
  return 0;
}

void Watch::clear() {
  // Emptied before anything is dropped: what goes may come back to this object.
  const auto dicts = std::exchange(dicts_, {}), counted = std::exchange(counted_, {});
  const auto lists = std::exchange(lists_, {});
  const auto attributes = std::exchange(attributes_, {});
  const auto counted_attributes = std::exchange(counted_attributes_, {});
}

namespace {

Watch* watch_of(PyObject* self) {
  const nb::handle object(self);
  return nb::inst_ready(object) ? nb::inst_ptr<Watch>(object) : nullptr;
}
int traverse_watch(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Watch* watch = watch_of(self);
  return watch ? watch->traverse(visit, arg) : 0;
}
int clear_watch(PyObject* self) {
  if (Watch* watch = watch_of(self)) watch->clear();
  return 0;
}

PyObject* note_change(PyObject*, PyObject*) {
  ++changes;
  return none();
}
PyMethodDef functions[] = {
    {"_note_change", note_change, METH_NOARGS,
     "Called after a change of anything that counts its changes (see graphs.Watch)."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_watch(nb::module_& root, nb::module_& graphs) {
  if (PyModule_AddFunctions(root.ptr(), functions) < 0) throw PythonError();
  auto* const object_type = reinterpret_cast<PyObject*>(&PyBaseObject_Type);
  rate_marker = checked(PyObject_CallNoArgs(object_type));
  nonzero_marker = checked(PyObject_CallNoArgs(object_type));
  absent_marker = checked(PyObject_CallNoArgs(object_type));
  graphs.attr("RATE") = nb::borrow(rate_marker);
  graphs.attr("NONZERO") = nb::borrow(nonzero_marker);
  graphs.attr("ABSENT") = nb::borrow(absent_marker);
  static PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_watch)},
                                {Py_tp_clear, reinterpret_cast<void*>(clear_watch)},
                                {0, nullptr}};
  nb::class_<Watch>(graphs, "Watch", nb::type_slots(slots),
                    "What a captured function found in Python's objects.")
      .def(nb::init<>())
      .def(
          "add_dict",
          [](Watch& self, const nb::object& dict, const nb::object& entries,
             const nb::object& ignored,
             bool counted) { self.add_dict(dict.ptr(), entries.ptr(), ignored.ptr(), counted); },
          nb::arg("dict"), nb::arg("entries"), nb::arg("ignored"), nb::arg("counted"),
          "All entries of a dict but ignored ones. RATE stands for any number, NONZERO for any but "
          "0, in tuples as well.")
      .def(
          "add_items",
          [](Watch& self, const nb::object& dict, const nb::object& entries,
             const nb::object& ignored,
             bool counted) { self.add_items(dict.ptr(), entries.ptr(), ignored.ptr(), counted); },
          nb::arg("dict"), nb::arg("entries"), nb::arg("ignored"), nb::arg("counted"),
          "Some entries of a dict. ABSENT stands for one that is not there.")
      .def_prop_ro("always", &Watch::always, "How many things each holds() looks at.")
      .def_prop_ro("counted", &Watch::counted, "How many more after a counted change.")
      .def(
          "add_list", [](Watch& self, const nb::object& list) { self.add_list(list.ptr()); },
          "The items that a list has now.")
      .def(
          "add_attribute",
          [](Watch& self, const nb::object& object, const nb::str& name, const nb::object& value,
             bool counted) { self.add_attribute(object.ptr(), name.ptr(), value.ptr(), counted); },
          nb::arg("object"), nb::arg("name"), nb::arg("value").none(), nb::arg("counted") = false,
          "An attribute's value. ABSENT stands for one that is not there.")
      .def("holds", &Watch::holds, "Whether everything is as it was.");
}

}  // namespace vt::python
