// vibetensor._C.graphs: the tape and the program of capture mode. Passes and plans are made in
// Python (graphs/) from what the tape shows here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <unordered_map>

#include "autograd/meta.h"
#include "dispatch/pointwise.h"
#include "dispatch/thread_state.h"
#include "graphs/lowering.h"
#include "graphs/memory.h"
#include "graphs/program.h"
#include "graphs/tape.h"
#include "python/arguments.h"
#include "python/foreign.h"
#include "python/graphs.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

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
struct PausedTape {
  Ref<Tape> tape;
};
struct PyCall {
  Ref<Call> call;
};
struct PyPool {
  Ref<graphs::Pool> pool;
};

/// All bytes of a storage, as a tensor.
nb::object bytes_of(const Ref<Storage>& storage) {
  auto impl = make_ref<TensorImpl>(storage, DType::UInt8, storage->device());
  const Dims all{static_cast<int64_t>(storage->nbytes())}, dense{1};
  impl->set_geometry(all, dense, 0);
  return nb::steal(wrap(Tensor(std::move(impl))));
}

/// Leaves whose hooks do not run for a while.
struct HooksOff {
  std::vector<Tensor> leaves;
  std::vector<std::vector<Ref<autograd::TensorHook>>> hooks;

  void swap() {
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (const auto& meta = leaves[i].impl()->autograd) std::swap(meta->hooks, hooks[i]);
    }
  }
};
struct Versions {
  std::vector<Tensor> tensors;
  std::vector<uint32_t> noted;

  void note() {
    noted.resize(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) noted[i] = tensors[i].version();
  }
  bool same() const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].version() != noted[i]) return false;
    }
    return true;
  }
};

/// Without the repetitions of an expanded tensor.
Tensor core(Tensor t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.strides()[static_cast<size_t>(d)] == 0 && t.sizes()[static_cast<size_t>(d)] > 1)
      t = ops::narrow(t, d, 0, 1);
  }
  return t;
}

nb::tuple shown_slot(const Slot& slot) {
  return nb::make_tuple(slot.storage, slot.offset, dims(slot.sizes), dims(slot.strides),
                        nb::steal(wrap_dtype(slot.dtype)), slot.number);
}
nb::tuple shown_storage(const StorageRecord& record) {
  // What the host filled and nobody else reaches can never change.
  const bool fixed = record.host && !record.borrowed && record.storage->use_count() == 1;
  return nb::make_tuple(record.nbytes, nb::steal(wrap_device(record.device)), record.fresh,
                        record.escapes, fixed);
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
          "Counters it draws from the start of the step; -1 for none.")
      .def_prop_rw(
          "switches", [](const PyCall& c) { return c.call->switches; },
          [](PyCall& c, uint32_t switches) { c.call->switches = switches; },
          "The switches of the process that its kernel sees: those of when it was recorded.");

  nb::class_<PyTape>(module, "Tape", "Records the ops that run on this thread.")
      .def(
          "__init__",
          [](PyTape* self, const std::string& package, bool dry, bool may_put_off) {
            const auto recording = dry ? graphs::Recording::Dry : graphs::Recording::Running;
            new (self) PyTape{make_ref<Tape>(&running_line, recording, may_put_off),
                              std::make_unique<SourceFinder>()};
            self->sources->package = package;
          },
          nb::arg("package"), nb::arg("dry") = false, nb::arg("may_put_off") = false)
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
      .def(
          "gradients_before",
          [](const PyTape& self) {
            nb::list out;
            for (const auto& [tensor, before] : self.tape->gradients_before()) {
              nb::object grad = nb::none();
              if (before.defined()) grad = nb::steal(wrap(before));
              out.append(nb::make_tuple(nb::steal(wrap(tensor)), grad));
            }
            return out;
          },
          "Of a dry recording: tensors whose .grad it changed, each with that of before.")
      .def_prop_ro(
          "puts_off", [](const PyTape& self) { return self.tape->puts_off(); },
          "Whether recorded ops are still to run, by a program or by catch_up().")
      .def(
          "catch_up",
          [](PyTape& self) {
            const nb::gil_scoped_release release;
            self.tape->catch_up();
          },
          "Runs what has been put off, op by op.")
      .def(
          "hand_over", [](PyTape& self) { self.tape->hand_over(); },
          "A program is about to run what has been put off.")
      .def(
          "loosen_foreign",
          [](PyTape& self) {
            for (const Ref<Call>& call : self.tape->calls()) {
              for (const Value& value : call->args) {
                if (const auto* function = std::get_if<Ref<ForeignFunction>>(&value))
                  loosen_foreign(**function);
              }
            }
          },
          "Leaves it to the caller to keep the callables of foreign ops alive.")
      .def(
          "put_back_tensors", [](PyTape& self) { self.tape->put_back_tensors(); },
          "Of a dry recording: tensors that were there before have the memory, the history and the "
          "requires_grad of then.")
      .def("forget_gradients_before", [](PyTape& self) { self.tape->forget_gradients_before(); })
      .def_prop_ro("failure", [](const PyTape& self) { return self.tape->failure(); })
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
          "constants",
          [](const PyTape& self) {
            nb::list out;
            const auto& storages = self.tape->storages();
            for (size_t i = 0; i < storages.size(); ++i) {
              const StorageRecord& record = storages[i];
              if (record.host && !record.borrowed && record.storage->use_count() == 1)
                out.append(i);
            }
            return out;
          },
          "Indices of the storages that the recorded function filled with host data and that "
          "nobody "
          "else reaches: their values cannot change. Not those that share memory with an array.")
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

  nb::class_<PyPool>(module, "Pool", "Device memory of captured steps.")
      .def(
          "__init__",
          [](PyPool* self, const nb::object& device, const std::pair<uint64_t, uint64_t>& handle) {
            const Device on = device_arg(device.ptr());
            new (self)
                PyPool{graphs::lowering_for(on.type).pool(on, {handle.first, handle.second})};
          },
          nb::arg("device"), nb::arg("handle") = std::pair<uint64_t, uint64_t>{0, 0},
          "The pool of that name, or for (0, 0) a new one.")
      .def_prop_ro("device",
                   [](const PyPool& self) { return nb::steal(wrap_device(self.pool->device())); })
      .def_prop_ro("handle",
                   [](const PyPool& self) {
                     const graphs::PoolHandle handle = self.pool->handle();
                     return std::pair(handle.first, handle.second);
                   })
      .def(
          "arena",
          [](PyPool& self, size_t nbytes) {
            Ref<Storage> arena;
            {
              const nb::gil_scoped_release release;
              arena = self.pool->arena(nbytes);
            }
            return bytes_of(arena);
          },
          "Memory of at least so many bytes for the intermediates of a step, the same as before "
          "where that is enough.");
  nb::class_<PausedTape>(module, "Paused", "A recording that sees nothing until it is resumed.")
      .def("resume", [](PausedTape& self) { self.tape->resume(); });
  module.def(
      "without_bytes",
      [](size_t nbytes, const nb::object& device) {
        const Device on = device_arg(device.ptr());
        return bytes_of(make_ref<Storage>(Allocation{nullptr, nbytes, nullptr, nullptr}, on));
      },
      "A tensor of so many bytes that have no memory, to stand for another where no op runs.");
  module.def(
      "pause",
      []() -> nb::object {
        Tape* tape = Tape::active();
        if (!tape) return nb::none();
        tape->pause();
        return nb::cast(PausedTape{Ref<Tape>(tape)});
      },
      "Pauses the recording on this thread; None if there is none.");
  module.def(
      "host_made",
      [](const nb::object& tensor) {
        const Tape* tape = Tape::active();
        return tape && tape->host_made(one_tensor(tensor));
      },
      "Whether the function that is being recorded has filled the tensor's memory with data of the "
      "host's. False where it shares memory with an array.");
  module.def(
      "recording",
      []() -> nb::object {
        const Tape* tape = Tape::active();
        if (!tape) return nb::none();
        return nb::str(tape->recording() == graphs::Recording::Dry ? "dry" : "running");
      },
      "How the ops of this thread are recorded: 'running', 'dry' or None for not at all.");

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
      .def(
          "upload",
          [](PyProgram& self, const nb::object& host, const nb::object& device) {
            return nb::steal(
                wrap(self.program->upload(one_tensor(host), device_arg(device.ptr()))));
          },
          "A tensor on the device that has, in each run, the values that a CPU tensor has there "
          "between the ops added before and after.")
      .def(
          "lower",
          [](PyProgram& self, const PyPool& pool) {
            const nb::gil_scoped_release release;
            self.program->lower(pool.pool);
          },
          "Hands the ops of the pool's device to it, as one graph.")
      .def_prop_ro(
          "on_device", [](const PyProgram& self) { return self.program->on_device() != nullptr; },
          "Whether a device has taken over its ops.")
      .def_prop_ro(
          "failed_op", [](const PyProgram& self) { return self.program->failed_op(); },
          "The op for which lower() failed; -1 if none is to blame.")
      .def_prop_ro("control_bytes",
                   [](const PyProgram& self) { return self.program->control_bytes(); })
      .def(
          "nodes", [](const PyProgram& self) { return self.program->nodes(); },
          "How many nodes of the device's graph each op became; empty if there is none.")
      .def(
          "node_kinds",
          [](const PyProgram& self) {
            nb::dict found;
            if (const graphs::DeviceProgram* device = self.program->on_device()) {
              for (const auto& [kind, count] : device->node_kinds()) found[kind.c_str()] = count;
            }
            return found;
          },
          "How many nodes of each kind the device's graph has (kernel, memset, memcpy, other).")
      .def(
          "dump",
          [](const PyProgram& self, const std::string& path) {
            check(self.program->on_device() != nullptr,
                  "this program has no device graph to write");
            self.program->on_device()->dump(path);
          },
          "Writes the device's graph as a DOT file.")
      .def("run",
           [](PyProgram& self) {
             const nb::gil_scoped_release release;
             self.program->run();
           })
      .def(
          "copy_in",
          [](PyProgram& self, const nb::object& place) {
            return self.program->copy_in(one_tensor(place));
          },
          "A copy that each run makes before its ops into a tensor without gaps; its number.")
      .def(
          "copy_out",
          [](PyProgram& self, const nb::object& base) {
            return self.program->copy_out(one_tensor(base));
          },
          "A copy that each run makes after its ops, of all bytes of a tensor's storage; its "
          "number.")
      .def(
          "extend", [](PyProgram& self) { self.program->extend(); },
          "Call after giving the current stream what reads the results of a run.")
      .def(
          "join", [](PyProgram& self) { self.program->join(); },
          "Call before writing what a run reads: the current stream waits for earlier runs.")
      .def("reserve", [](PyProgram& self) { self.program->reserve(); })
      .def("run_op", [](PyProgram& self, size_t index) { self.program->run_op(index); })
      .def("__len__", [](const PyProgram& self) { return self.program->size(); });

  nb::class_<graphs::Loan>(module, "Loan", "A result that every replay overwrites.")
      .def(
          "__init__",
          [](graphs::Loan* self, const nb::object& base, int64_t transfer) {
            new (self) graphs::Loan(one_tensor(base).storage(), transfer);
          },
          nb::arg("base"), nb::arg("transfer") = -1)
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
         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, bool number) {
        const Tensor& on = one_tensor(base);
        const DType type = dtype_arg(dtype.ptr());
        const int64_t reach = span_elements(sizes, strides) * item_size(type);
        // A tensor without elements may lie anywhere, as a slice past the end of an empty one does.
        check(
            byte_offset >= 0 && byte_offset % item_size(type) == 0 &&
                (reach == 0 || static_cast<size_t>(byte_offset + reach) <= on.storage()->nbytes()),
            "tensor_on: the geometry does not fit the storage");
        auto impl = make_ref<TensorImpl>(on.storage(), type, on.device());
        impl->set_geometry(sizes, strides, byte_offset / item_size(type));
        impl->wrapped_number = number;
        return nb::steal(wrap(Tensor(std::move(impl))));
      },
      nb::arg("base"), nb::arg("byte_offset"), nb::arg("dtype"), nb::arg("sizes"),
      nb::arg("strides"), nb::arg("number") = false,
      "A tensor of any geometry at a byte offset from the start of another's storage; a number is "
      "one that promotes as a Python number does.");
  nb::class_<HooksOff>(module, "HooksOff", "Leaves whose hooks do not run in a with block.")
      .def("__init__",
           [](HooksOff* self, const nb::object& leaves) {
             new (self) HooksOff{tensors_from(leaves), {}};
             self->hooks.resize(self->leaves.size());
           })
      .def("__enter__", [](HooksOff& self) { self.swap(); })
      .def("__exit__", [](HooksOff& self, const nb::args&) { self.swap(); });
  nb::class_<Versions>(module, "Versions", "Whether tensors have been changed in place.")
      .def("__init__",
           [](Versions* self, const nb::object& tensors) {
             new (self) Versions{tensors_from(tensors), {}};
             self->note();
           })
      .def("note", &Versions::note, "They are as they should be now.")
      .def("same", &Versions::same, "Whether they are as they were then.");
  module.def(
      "versions",
      [](const nb::object& tensors) {
        nb::list out;
        for (const Tensor& t : tensors_from(tensors)) out.append(t.version());
        return out;
      },
      "How often each tensor has been changed in place.");
  module.def(
      "copy_into",
      [](const nb::object& targets, const nb::object& values) {
        const std::vector<Tensor> to = tensors_from(targets), from = tensors_from(values);
        check(to.size() == from.size(), "copy_into: ", to.size(), " places for ", from.size());
        const Scoped<bool> no_grad(thread_state.grad_enabled, false);
        for (size_t i = 0; i < to.size(); ++i) ops::copy_(core(to[i]), core(from[i]), false);
      },
      "Copies each value into its place; of expanded tensors what is there once.");
  module.def(
      "copies",
      [](const nb::object& tensors) {
        const Scoped<bool> no_grad(thread_state.grad_enabled, false);
        nb::list out;
        for (const Tensor& t : tensors_from(tensors)) {
          nb::object copy = nb::none();
          if (t.defined()) copy = nb::steal(wrap(ops::clone(t, std::nullopt)));
          out.append(copy);
        }
        return out;
      },
      "Each tensor in memory of its own; None for None.");
  module.def(
      "set_version",
      [](const nb::object& tensor, uint32_t version) {
        one_tensor(tensor).storage()->version().store(version, std::memory_order_relaxed);
      },
      "Sets what counts the changes of the tensor's storage: a replay writes what was recorded.");
  module.def(
      "saved_hooks",
      []() {
        return thread_state.saved_hooks || thread_state.anomaly_enabled ||
               (thread_state.front & kModes);
      },
      "Whether this thread looks at each op, or at each that saves tensors for backward: with "
      "saved_tensors_hooks, in anomaly mode, under a library.Mode.");
  module.def(
      "pointwise",
      [](const std::string& name, const nb::object& inputs) -> nb::object {
        const int found = find_op(name);
        check_value(found >= 0, "no op is named ", name);
        const auto id = static_cast<OpId>(found);
        const std::optional<Promote> promotion = op_promotion(id);
        if (!promotion) return nb::make_tuple(found, nb::none());
        const std::vector<Tensor> tensors = tensors_from(inputs);
        if (*promotion == Promote::None || tensors.empty())
          return nb::make_tuple(found, nb::none());
        std::vector<const Tensor*> pointers;
        for (const Tensor& t : tensors) pointers.push_back(&t);
        DType common = result_type(pointers);
        if (*promotion == Promote::Float && !is_floating(common)) common = default_dtype();
        return nb::make_tuple(found, nb::steal(wrap_dtype(common)));
      },
      "The number of an op, and the dtype it computes in on these inputs; None for one that keeps "
      "them as they are or is not of the kind pointwise.");
  module.def(
      "has_pointwise_kernel",
      [](const std::string& name) {
        const int found = find_op(name);
        return found >= 0 && pointwise_kernel(static_cast<OpId>(found)) != nullptr;
      },
      "Whether the op can be one of those that _fused_pointwise runs block by block.");
  module.def(
      "chains_problem",
      [](const nb::object& device) {
        const Device on = device_arg(device.ptr());
        return on.is_cpu() ? std::string() : graphs::lowering_for(on.type).chains_problem();
      },
      "Why a device has no kernels for _fused_pointwise; empty if it has.");
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
