#include "python/replay.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "autograd/front.h"
#include "dispatch/thread_state.h"
#include "python/arguments.h"
#include "python/array_interface.h"
#include "python/graphs.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace nb = nanobind;

namespace vt::python {
namespace {

// Up to here one thread copies as fast as several.
constexpr int64_t kSmallCopy = 64 * 1024;

template <class F>
void for_each(const Object& sequence, F&& f) {
  const Py_ssize_t n = PyList_Size(sequence.get());
  if (n < 0) throw PythonError();
  for (Py_ssize_t i = 0; i < n; ++i) f(PyList_GetItem(sequence.get(), i));
}
PyObject* item(PyObject* tuple, Py_ssize_t i) {
  PyObject* found = PyTuple_GetItem(tuple, i);
  return checked(found);
}
/// None is an undefined tensor.
Tensor optional_tensor(PyObject* object) {
  if (object == Py_None) return {};
  check_type(is_tensor(object), "a replay expects a tensor or None");
  return tensor_of(object);
}
template <class T>
T* instance(PyObject* object) {
  return nb::cast<T*>(nb::handle(object));
}

const Tensor* grad_of(const Tensor& leaf) {
  const autograd::AutogradMeta* meta = leaf.impl()->autograd.get();
  return meta ? &meta->grad : nullptr;
}
bool has_grad(const Tensor& leaf, const Tensor& grad) {
  const Tensor* now = grad_of(leaf);
  return now ? now->is_same(grad) : !grad.defined();
}

/// Bytes that can be copied as they lie.
bool is_block(const Tensor& t) { return t.is_contiguous() && t.device().is_cpu() && t.numel() > 0; }

}  // namespace

Replay::Replay(const Parts& parts)
    : kept_{parts.program, parts.guard, parts.course, parts.tensors},
      program_(instance<PyProgram>(parts.program.get())->program.get()),
      guard_(instance<graphs::Guard>(parts.guard.get())),
      course_(instance<Watch>(parts.course.get())),
      tensors_(instance<Watch>(parts.tensors.get())),
      build_(parts.build),
      structure_(Structure::parse(parts.structure.get())) {
  if (structure_ && !structure_->plain()) structure_.reset();
  for_each(parts.inputs, [&](PyObject* target) { inputs_.push_back(optional_tensor(target)); });
  for_each(parts.transfers, [&](PyObject* number) { transfers_.push_back(int_arg(number)); });
  check(transfers_.size() == inputs_.size(), "a replay has a transfer, or -1, for each input");
  for_each(parts.apart, [&](PyObject* tensors) {
    std::vector<const Storage*>& storages = apart_.emplace_back();
    for_each(Object::borrow(tensors),
             [&](PyObject* t) { storages.push_back(tensor_of(t).storage().get()); });
    std::sort(storages.begin(), storages.end());
  });
  for_each(parts.acts, [&](PyObject* act) {
    const bool rate = PyTuple_Check(act);
    acts_.push_back({Object::borrow(rate ? item(act, 0) : act),
                     rate ? optional_tensor(item(act, 1)) : Tensor(),
                     rate ? Object::borrow(item(act, 2)) : Object()});
  });
  for_each(parts.outputs, [&](PyObject* output) {
    PyObject* how = item(output, 1);
    if (item(output, 0) == Py_None) {
      outputs_.push_back({Object::borrow(how), nullptr, 0, {}, {}, {}});
      return;
    }
    auto* loan = instance<graphs::Loan>(item(output, 0));
    if (std::find(loans_.begin(), loans_.end(), loan) == loans_.end()) loans_.push_back(loan);
    copies_after_ |= loan->transfer() < 0;
    outputs_.push_back({Object::borrow(item(output, 0)), loan, int_arg(item(how, 0)),
                        dtype_arg(item(how, 1)), int_list_arg(item(how, 2), 0),
                        int_list_arg(item(how, 3), 0)});
  });
  for_each(parts.gradients, [&](PyObject* gradient) {
    gradients_.push_back({optional_tensor(item(gradient, 0)), optional_tensor(item(gradient, 1)),
                          optional_tensor(item(gradient, 2))});
  });
  for_each(parts.found, [&](PyObject* found) {
    check_type(is_tensor(item(found, 0)), "only tensors have gradients");
    found_.push_back({tensor_of(item(found, 0)).ref(), item(found, 1) == Py_True});
  });
  touch();
}

void Replay::touch() {
  static std::atomic<uint64_t> uses{0};
  last_used_ = uses.fetch_add(1, std::memory_order_relaxed) + 1;
}

bool Replay::holds() { return course_->holds() && guard_->holds() && tensors_->holds(); }

bool Replay::gradients_as_found() const {
  return std::all_of(found_.begin(), found_.end(), [](const Found& found) {
    const autograd::AutogradMeta* meta = found.leaf->autograd.get();
    return (meta && meta->grad.defined()) == found.has_grad;
  });
}

bool Replay::gradients_in_place() const {
  return std::all_of(gradients_.begin(), gradients_.end(), [](const Gradient& g) {
    return !g.start.defined() || has_grad(g.leaf, g.start);
  });
}

void Replay::stage(const Argument& argument, const Tensor& target, int64_t transfer) const {
  const int64_t bytes = target.numel() * target.itemsize();
  const bool block = is_block(target) && bytes <= kSmallCopy;
  if (const ArrayStruct* array = argument.array) {
    if (block) {
      std::memcpy(target.data(), array->data, static_cast<size_t>(bytes));
      target.bump_version();
      return;
    }
    const Tensor source =
        borrow(array->data, static_cast<size_t>(bytes), argument.capsule.get(), false,
               target.sizes(), contiguous_strides(target.sizes()), target.dtype());
    ReleaseGil released(target.numel());
    ops::copy_(target, source, false);
    return;
  }
  const Tensor source = tensor_of(argument.object.get());
  if (transfer >= 0 && thread_state.front == 0 && source.device() == target.device() &&
      source.impl()->strides == target.impl()->strides) {
    // The run fetches it; the caller's tensor has its memory until then, in the stream's order.
    program_->bind(static_cast<size_t>(transfer), source.data());
    target.bump_version();
    return;
  }
  if (block && is_block(source) && thread_state.front == 0) {
    std::memcpy(target.data(), source.data(), static_cast<size_t>(bytes));
    target.bump_version();
    return;
  }
  ReleaseGil released(target.numel());
  ops::copy_(target, source, false);
}

void Replay::perform(const Act& act) const {
  if (!act.live.defined()) {
    const Object done = own(PyObject_CallNoArgs(act.group.get()));
    return;
  }
  PyObject* rate = PyDict_GetItemWithError(act.group.get(), act.name.get());
  if (rate && PyTuple_Check(rate)) rate = item(rate, 0);  // betas
  if (rate && is_tensor(rate)) {
    const NoGrad no_grad;
    ops::copy_(act.live, ops::reshape(tensor_of(rate), act.live.sizes()), false);
    return;
  }
  const double value = rate ? PyFloat_AsDouble(rate) : -1;
  if (!rate && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, act.name.get());
  if (PyErr_Occurred()) throw PythonError();
  if (act.live.device().is_cpu() && act.live.dtype() == DType::Float64) {
    *act.live.data_as<double>() = value;
    act.live.bump_version();
  } else {
    ops::fill_(act.live, wrapped_scalar(Scalar(value)));
  }
}

Object Replay::results() const {
  SmallVector<Object, 4> leaves;
  for (const Output& output : outputs_) {
    if (output.loan) {
      leaves.push_back(own(wrap(
          output.loan->tensor(output.byte_offset, output.dtype, output.sizes, output.strides))));
    } else if (is_tensor(output.object.get())) {
      // A new one each time: what the caller does to it must not show in the next.
      const NoGrad no_grad;
      leaves.push_back(own(wrap(ops::detach(tensor_of(output.object.get())))));
    } else {
      leaves.push_back(output.object);
    }
  }
  if (structure_) {
    std::span<Object> rest(leaves.begin(), leaves.end());
    return structure_->build(rest);
  }
  const Object list = own(PyList_New(static_cast<Py_ssize_t>(leaves.size())));
  for (size_t i = 0; i < leaves.size(); ++i)
    PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), leaves[i].release());
  return own(PyObject_CallFunctionObjArgs(build_.get(), list.get(), nullptr));
}

bool Replay::stands_apart(size_t index, PyObject* argument) const {
  if (index >= apart_.size() || apart_[index].empty() || !is_tensor(argument)) return true;
  const std::vector<const Storage*>& taken = apart_[index];
  return !std::binary_search(taken.begin(), taken.end(), tensor_of(argument).storage().get());
}

Object Replay::run(const Arguments& arguments) {
  program_->join();  // earlier runs read their inputs before others are written
  {
    const NoGrad no_grad;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (inputs_[i].defined()) stage(arguments[i], inputs_[i], transfers_[i]);
    }
  }
  launch();
  Object made = results();
  if (copies_after_) program_->extend();
  return made;
}

bool Replay::run_in_place() {
  if (thread_state.consumer || !guard_->holds() || !tensors_->holds() || !gradients_in_place())
    return false;
  program_->join();  // earlier runs read rates before others are written
  launch();
  return true;
}

void Replay::launch() {
  for (graphs::Loan* loan : loans_) loan->settle();
  for (const Act& act : acts_) perform(act);
  // Last, as schedules are Python code that may drop results and run other steps.
  for (graphs::Loan* loan : loans_) {
    if (loan->transfer() >= 0) program_->bind(static_cast<size_t>(loan->transfer()), loan->place());
  }
  {
    const ReleaseGil released(ReleaseGil::kWorthwhile);
    program_->run();
  }
  ++count_;
  touch();
  for (const Gradient& g : gradients_) {
    if (!has_grad(g.leaf, g.end)) autograd::ensure_meta(g.leaf).grad = g.end;
  }
}

int Replay::traverse(visitproc visit, void* arg) const {
  for (const Object& object : kept_) Py_VISIT(object.get());
  for (const Act& act : acts_) {
    Py_VISIT(act.group.get());
    Py_VISIT(act.name.get());
  }
  for (const Output& output : outputs_) Py_VISIT(output.object.get());
  Py_VISIT(build_.get());
  return structure_ ? structure_->traverse(visit, arg) : 0;
}

bool Replays::add(PyObject* spec, PyObject* leaves, std::vector<Object> replays) {
  std::unique_ptr<CallKey> key = CallKey::make(spec, leaves);
  if (!key) return false;
  auto entry = std::make_shared<const Entry>(Entry{std::move(key), std::move(replays)});
  entries_.insert(entries_.begin(), std::move(entry));
  return true;
}

void Replays::clear() {
  // Emptied before anything is dropped: what goes may come back to this object.
  const auto entries = std::exchange(entries_, {});
  const Object last = std::exchange(last_, Object());
}

Object Replays::run(PyObject* args, PyObject* kwargs) {
  // Whoever looks at each op, or at what each saves, is not served by a replay.
  if (thread_state.consumer || thread_state.anomaly_enabled || thread_state.saved_hooks ||
      (thread_state.front & kModes))
    return {};
  for (size_t i = 0; i < entries_.size(); ++i) {
    // Kept: properties and schedules are Python code, which may do anything, clear this included.
    const std::shared_ptr<const Entry> entry = entries_[i];
    Arguments arguments;
    if (!entry->key->matches(args, kwargs, arguments)) continue;
    for (const Object& object : entry->replays) {
      auto* replay = instance<Replay>(object.get());
      if (!replay->gradients_as_found() || !replay->holds()) continue;
      if (!replay->gradients_in_place()) return {};
      for (size_t a = 0; a < arguments.size(); ++a) {
        if (!replay->stands_apart(a, arguments[a].object.get())) return {};
      }
      if (i < entries_.size() && entries_[i] == entry) {
        const auto found = entries_.begin() + static_cast<std::ptrdiff_t>(i);
        std::rotate(entries_.begin(), found, found + 1);
        last_ = object;
      }
      return replay->run(arguments);
    }
    return {};
  }
  return {};
}

int Replays::traverse(visitproc visit, void* arg) const {
  Py_VISIT(last_.get());
  for (const std::shared_ptr<const Entry>& entry : entries_) {
    for (const Object& replay : entry->replays) Py_VISIT(replay.get());
    if (const int stop = entry->key->traverse(visit, arg)) return stop;
  }
  return 0;
}

namespace {

template <class T>
T* ready_instance(PyObject* self) {
  const nb::handle object(self);
  return nb::inst_ready(object) ? nb::inst_ptr<T>(object) : nullptr;
}
template <class T>
int traverse_instance(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const T* object = ready_instance<T>(self);
  return object ? object->traverse(visit, arg) : 0;
}
int clear_replays(PyObject* self) {
  if (auto* replays = ready_instance<Replays>(self)) replays->clear();
  return 0;
}

Object kept(const nb::object& object) { return Object::borrow(object.ptr()); }
nb::object given(Object object) { return nb::steal(object.release()); }

}  // namespace

void bind_replay(nb::module_& graphs) {
  static PyType_Slot replay_slots[] = {
      {Py_tp_traverse, reinterpret_cast<void*>(traverse_instance<Replay>)}, {0, nullptr}};
  nb::class_<Replay>(graphs, "Replay", nb::type_slots(replay_slots),
                     "A captured course, replayed without Python code.")
      .def(
          "__init__",
          [](Replay* self, const nb::object& program, const nb::object& guard,
             const nb::object& course, const nb::object& tensors, const nb::list& inputs,
             const nb::list& transfers, const nb::list& acts, const nb::list& outputs,
             const nb::object& structure, const nb::object& build, const nb::list& gradients,
             const nb::list& found, const nb::list& apart) {
            new (self)
                Replay({kept(program), kept(guard), kept(course), kept(tensors), kept(inputs),
                        kept(transfers), kept(acts), kept(outputs), kept(structure), kept(build),
                        kept(gradients), kept(found), kept(apart)});
          },
          nb::kw_only(), nb::arg("program"), nb::arg("guard"), nb::arg("course"),
          nb::arg("tensors"), nb::arg("inputs"), nb::arg("transfers"), nb::arg("acts"),
          nb::arg("outputs"), nb::arg("structure"), nb::arg("build"), nb::arg("gradients"),
          nb::arg("found"), nb::arg("apart") = nb::list())
      .def_prop_ro("count", &Replay::count, "How often it ran.")
      .def_prop_ro("last_used", &Replay::last_used, "Larger than that of all used before.")
      .def("touch", &Replay::touch, "It has been used, without Python code or with.")
      .def("gradients_as_found", &Replay::gradients_as_found,
           "Whether the same leaves have a .grad as when it was recorded.")
      .def(
          "stand_apart",
          [](const Replay& self, const nb::list& leaves) {
            for (size_t i = 0; i < leaves.size(); ++i) {
              if (!self.stands_apart(i, nb::object(leaves[i]).ptr())) return false;
            }
            return true;
          },
          "Whether no argument of a call lies where its copy would not do.")
      .def("run_in_place", &Replay::run_in_place,
           "Replays a block without arguments and results; False, and nothing is done, where a "
           "tensor "
           "is not where it was or a recording is active.")
      .def("holds", &Replay::holds);

  static PyType_Slot replays_slots[] = {
      {Py_tp_traverse, reinterpret_cast<void*>(traverse_instance<Replays>)},
      {Py_tp_clear, reinterpret_cast<void*>(clear_replays)},
      {0, nullptr}};
  nb::class_<Replays>(graphs, "Replays", nb::type_slots(replays_slots),
                      "The courses of a captured function, by the calls they belong to.")
      .def(nb::init<>())
      .def(
          "add",
          [](Replays& self, const nb::object& spec, const nb::list& leaves,
             const nb::list& replays) {
            std::vector<Object> all;
            for (const nb::handle replay : replays) {
              check_type(nb::isinstance<Replay>(replay), "Replays.add expects Replays");
              all.push_back(Object::borrow(replay.ptr()));
            }
            return self.add(spec.ptr(), leaves.ptr(), std::move(all));
          },
          nb::arg("spec"), nb::arg("leaves"), nb::arg("replays"),
          "Courses for calls like the one that runs: with this structure, leaves and modes of the "
          "thread. False where a leaf is of a kind that only Python can tell apart.")
      .def("clear", &Replays::clear)
      .def("forget_last", &Replays::forget_last)
      .def_prop_ro("last",
                   [](const Replays& self) {
                     return self.last() ? nb::borrow(self.last().get()) : nb::none();
                   })
      .def(
          "run",
          [](Replays& self, const nb::object& args, const nb::object& kwargs,
             const nb::object& missed) {
            Object result = self.run(args.ptr(), kwargs.ptr());
            return result ? given(std::move(result)) : missed;
          },
          nb::arg("args"), nb::arg("kwargs"), nb::arg("missed"),
          "The result of a replay, or `missed` where the call belongs to none of them.");
}

}  // namespace vt::python
