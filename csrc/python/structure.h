// The shape of nested tuples, lists and dicts, as graphs/structure.py describes it: a leaf is any
// object, a container is (type, children), children of a dict are (key, child) pairs and its type
// is (type, default factory).
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "core/small_vector.h"
#include "python/python.h"

namespace vt::python {

using Leaves = SmallVector<PyObject*, 16>;  // borrowed

class Structure {
 public:
  /// Nothing where it has dicts of other types or with other keys than strings.
  static std::optional<Structure> parse(PyObject* spec);

  /// Appends the leaves of `value`. False if it is not of this structure; the leaves that were
  /// taken until then are of no use.
  bool flatten(PyObject* value, Leaves& leaves) const;
  /// Whether build() can make it: it has no named tuples or other subclasses.
  bool plain() const;
  /// The containers with these leaves in them; takes them from the front.
  Object build(std::span<Object>& leaves) const;

  std::span<const Structure> children() const { return children_; }
  int traverse(visitproc visit, void* arg) const;

 private:
  enum class Kind : uint8_t { Leaf, Tuple, List, Dict };

  Kind kind_ = Kind::Leaf;
  Object type_;               // of a tuple
  std::vector<Object> keys_;  // of a dict
  std::vector<Structure> children_;
};

}  // namespace vt::python
