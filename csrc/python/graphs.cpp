// vibetensor._C.graphs: the tape and the program of capture mode. Passes and plans are made in
// Python (graphs/) from what the tape shows here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <unordered_map>

#include "graphs/memory.h"
#include "graphs/program.h"
#include "graphs/tape.h"
#include "python/arguments.h"
#include "python/graphs.h"
#include "python/tensor_type.h"

namespace nb = nanobind;

namespace vt::python {

void bind_watch(nb::module_& root, nb::module_& graphs);
void bind_replay(nb::module_& graphs);

namespace {

namespace graphs = vt::graphs;
using graphs::Call;
using graphs::Program;
using graphs::Slot;
using graphs::Source;
using graphs::StorageRecord;
using graphs::Tape;

/// Where code lies, kept while a recording runs.
struct Code {
  nb::object object;
  std::string file, function;
  bool ours = false;
};
struct SourceFinder {
  std::string package;  // folder whose frames are skipped
  std::unordered_map<PyObject*, Code> codes;
  Source found;
};
thread_local SourceFinder* finder = nullptr;  // of the recording on this thread

/// A string of Python's as UTF-8; what is no text in a file name becomes "?".
std::string text_of(const nb::object& string) {
  const auto bytes =
      nb::steal<nb::bytes>(PyUnicode_AsEncodedString(string.ptr(), "utf-8", "replace"));
  if (!bytes.is_valid()) throw nb::python_error();
  return {bytes.c_str(), bytes.size()};
}

/// The innermost line outside the package that is running on this thread.
const Source* running_line() {
  const AcquireGil gil;
  if (!finder) return nullptr;
  static PyObject* const f_back = PyUnicode_InternFromString("f_back");
  auto frame = nb::steal(reinterpret_cast<PyObject*>(PyThreadState_GetFrame(PyThreadState_Get())));
  while (frame && !frame.is_none()) {
    auto* const view = reinterpret_cast<PyFrameObject*>(frame.ptr());
    auto code = nb::steal(reinterpret_cast<PyObject*>(PyFrame_GetCode(view)));
    const auto [place, added] = finder->codes.try_emplace(code.ptr());
    Code& known = place->second;
    if (added) {
      known.object = code;
      known.file = text_of(code.attr("co_filename"));
      known.function = text_of(code.attr("co_name"));
      known.ours = known.file.starts_with(finder->package);
    }
    if (!known.ours) {
      finder->found = {known.file, known.function, PyFrame_GetLineNumber(view)};
      return &finder->found;
    }
    frame = nb::steal(PyObject_GetAttr(frame.ptr(), f_back));
    if (!frame) PyErr_Clear();
  }
  return nullptr;
}

nb::tuple dims(const Dims& values) {
  nb::list out;
  for (const int64_t v : values) out.append(v);
  return nb::tuple(out);
}

/// A call's arguments as (kind, value): 0 a value, 1 a tensor, 2 a list of that many tensors. The
/// tensors follow in `inputs`.
nb::tuple shown_args(const Call& call) {
  nb::list out;
  for (const Value& value : call.args) {
    if (std::holds_alternative<Tensor>(value)) {
      out.append(nb::make_tuple(1, nb::none()));
    } else if (const auto* list = std::get_if<std::vector<Tensor>>(&value)) {
      out.append(nb::make_tuple(2, list->size()));
    } else if (std::holds_alternative<PhiloxArgs>(value)) {
      out.append(nb::make_tuple(0, nb::none()));
    } else {
      out.append(nb::make_tuple(0, nb::steal(value_to_python(value))));
    }
  }
  return nb::tuple(out);
}

std::vector<Tensor> tensors_from(const nb::handle& sequence) {
  std::vector<Tensor> out;
  for (const nb::handle item : sequence) {
    if (item.is_none()) {
      out.emplace_back();
    } else {
      if (!is_tensor(item.ptr())) throw nb::type_error("expected tensors or None");
      out.push_back(tensor_of(item.ptr()));
    }
  }
  return out;
}

const Tensor& one_tensor(const nb::object& object) {
  if (!is_tensor(object.ptr())) throw nb::type_error("expected a Tensor");
  return tensor_of(object.ptr());
}

struct PyTape {
  Ref<Tape> tape;
  std::unique_ptr<SourceFinder> sources;
};
struct PyCall {
  Ref<Call> call;
};

nb::tuple shown_slot(const Slot& slot) {
  return nb::make_tuple(slot.storage, slot.offset, dims(slot.sizes), dims(slot.strides),
                        nb::steal(wrap_dtype(slot.dtype)));
}
nb::tuple shown_storage(const StorageRecord& record) {
  return nb::make_tuple(record.nbytes, nb::steal(wrap_device(record.device)), record.fresh,
                        record.escapes);
}

}  // namespace

void bind_graphs(nb::module_& m) {
  nb::module_ module = m.def_submodule("graphs", "The tape and the program of capture mode.");
  nb::class_<PyCall>(module, "Call", "One op of a tape.")
      .def_prop_ro("name", [](const PyCall& c) { return std::string(op_name(c.call->id)); })
      .def_prop_ro("capture_class",
                   [](const PyCall& c) { return std::string(op_capture_class(c.call->id)); })
      .def_prop_ro("args", [](const PyCall& c) { return shown_args(*c.call); })
      .def_prop_ro("inputs", [](const PyCall& c) { return c.call->inputs; })
      .def_prop_ro("outputs", [](const PyCall& c) { return c.call->outputs; })
      .def_prop_ro("phase", [](const PyCall& c) { return static_cast<int>(c.call->phase); })
      .def_prop_ro("is_view", [](const PyCall& c) { return c.call->is_view; })
      .def_prop_ro("source", [](const PyCall& c) { return c.call->source; })
      .def_prop_rw(
          "random_offset", [](const PyCall& c) { return c.call->random_offset; },
          [](PyCall& c, int64_t offset) { c.call->random_offset = offset; },
          "Counters it draws from the start of the step; -1 for none.");

  nb::class_<PyTape>(module, "Tape", "Records the ops that run on this thread.")
      .def(
          "__init__",
          [](PyTape* self, const std::string& package, bool dry) {
            const auto recording = dry ? graphs::Recording::Dry : graphs::Recording::Running;
            new (self)
                PyTape{make_ref<Tape>(&running_line, recording), std::make_unique<SourceFinder>()};
            self->sources->package = package;
          },
          nb::arg("package"), nb::arg("dry") = false)
      .def("start",
           [](PyTape& self) {
             self.tape->start();
             finder = self.sources.get();
           })
      .def("stop",
           [](PyTape& self) {
             finder = nullptr;
             self.sources->codes.clear();
             self.tape->stop();
           })
      .def("find_escapes", [](PyTape& self) { self.tape->find_escapes(); })
      .def("calls",
           [](const PyTape& self) {
             nb::list out;
             for (const Ref<Call>& call : self.tape->calls()) out.append(nb::cast(PyCall{call}));
             return out;
           })
      .def("slots",
           [](const PyTape& self) {
             nb::list out;
             for (const Slot& slot : self.tape->slots()) out.append(shown_slot(slot));
             return out;
           })
      .def("storages",
           [](const PyTape& self) {
             nb::list out;
             for (const StorageRecord& record : self.tape->storages())
               out.append(shown_storage(record));
             return out;
           })
      .def("sources",
           [](const PyTape& self) {
             nb::list out;
             for (const Source& source : self.tape->sources())
               out.append(nb::make_tuple(source.file, source.line, source.function));
             return out;
           })
      .def(
          "firsts",
          [](const PyTape& self) {
            nb::list out;
            for (const StorageRecord& record : self.tape->storages()) {
              if (record.first.defined()) out.append(nb::steal(wrap(record.first)));
            }
            return out;
          },
          "A tensor on each storage that was there before the recording.")
      .def("leaves",
           [](const PyTape& self) {
             nb::list out;
             for (const Tensor& leaf : self.tape->leaves()) out.append(nb::steal(wrap(leaf)));
             return out;
           })
      .def("find", [](const PyTape& self,
                      const nb::object& tensor) { return self.tape->find(one_tensor(tensor)); })
      .def("draws",
           [](const PyTape& self) {
             nb::list out;
             for (const Device device : self.tape->random_devices())
               out.append(
                   nb::make_tuple(nb::steal(wrap_device(device)), self.tape->counters(device)));
             return out;
           })
      .def("tensor",
           [](const PyTape& self, int slot) { return nb::steal(wrap(self.tape->tensor(slot))); });

  nb::class_<PyProgram>(module, "Program", "A captured step as a flat list of kernel calls.")
      .def(nb::init<>())
      .def("add",
           [](PyProgram& self, const PyCall& call, const nb::object& inputs,
              const nb::object& outputs) {
             self.program->add(*call.call, tensors_from(inputs), tensors_from(outputs));
           })
      .def("draw",
           [](PyProgram& self, const nb::object& device, uint64_t counters) {
             self.program->draw(device_arg(device.ptr()), counters);
           })
      .def("run",
           [](PyProgram& self) {
             const nb::gil_scoped_release release;
             self.program->run();
           })
      .def("reserve", [](PyProgram& self) { self.program->reserve(); })
      .def("run_op", [](PyProgram& self, size_t index) { self.program->run_op(index); })
      .def("__len__", [](const PyProgram& self) { return self.program->size(); });

  nb::class_<graphs::Loan>(module, "Loan", "A result that every replay overwrites.")
      .def("__init__",
           [](graphs::Loan* self, const nb::object& base) {
             new (self) graphs::Loan(one_tensor(base).storage());
           })
      .def("tensor",
           [](graphs::Loan& self, int64_t byte_offset, const nb::object& dtype,
              const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
             return nb::steal(
                 wrap(self.tensor(byte_offset, dtype_arg(dtype.ptr()), sizes, strides)));
           })
      .def("settle", &graphs::Loan::settle,
           "Before a replay: a loan that is still held moves to memory of its own.");

  nb::class_<graphs::Guard>(module, "Guard", "Tensors whose memory a captured step has bound.")
      .def(nb::init<>())
      .def("add", [](graphs::Guard& self, const nb::object& t) { self.add(one_tensor(t)); })
      .def("holds", &graphs::Guard::holds);

  module.def(
      "tensor_on",
      [](const nb::object& base, int64_t byte_offset, const nb::object& dtype,
         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        const Tensor& on = one_tensor(base);
        const DType type = dtype_arg(dtype.ptr());
        const int64_t reach = span_elements(sizes, strides) * item_size(type);
        check(byte_offset >= 0 && byte_offset % item_size(type) == 0 &&
                  static_cast<size_t>(byte_offset + reach) <= on.storage()->nbytes(),
              "tensor_on: the geometry does not fit the storage");
        auto impl = make_ref<TensorImpl>(on.storage(), type, on.device());
        impl->set_geometry(sizes, strides, byte_offset / item_size(type));
        return nb::steal(wrap(Tensor(std::move(impl))));
      },
      "A tensor of any geometry at a byte offset from the start of another's storage.");
  module.def(
      "gradient",
      [](const nb::object& leaf) {
        const autograd::AutogradMeta* meta = one_tensor(leaf).impl()->autograd.get();
        return nb::steal(meta ? wrap(meta->grad) : none());
      },
      "A leaf's .grad, without telling a recording that it was read.");
  module.def(
      "storage_uses",
      [](const nb::object& tensor) { return one_tensor(tensor).storage()->use_count(); },
      "How many tensors (and others) hold the tensor's storage.");
  bind_watch(m, module);
  bind_replay(module);
}

}  // namespace vt::python
