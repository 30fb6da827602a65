// vibetensor._C: types, generated ops, and what is bound by hand.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "core/device_backend.h"
#include "core/generator.h"
#include "core/host_wait.h"
#include "core/kernel_switches.h"
#include "core/parallel.h"
#include "cpu/allocator.h"
#include "cpu/backend.h"
#include "dispatch/default_device.h"
#include "dispatch/thread_state.h"
#include "python/arguments.h"
#include "python/autograd.h"
#include "python/tensor_type.h"
#include "vt/ops.h"

namespace nb = nanobind;

namespace vt::python {

extern PyObject* out_of_memory_error;
extern PyMethodDef* conversion_functions;
void bind_build_info(nb::module_& m);
void bind_graphs(nb::module_& m);
void bind_nvtx(nb::module_& m);
void bind_safetensors(nb::module_& m);
void collect_ops_0(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);
void collect_ops_1(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);
void collect_ops_2(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);
void collect_ops_3(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);
void collect_ops_4(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);
void collect_ops_5(std::vector<PyMethodDef>& methods, std::vector<PyMethodDef>& functions);

namespace {

/// The generated functions live in the submodule `_C._ops`.
void add_ops(nb::module_& m) {
  // Method tables must outlive the types and modules made from them.
  static auto* methods = new std::vector<PyMethodDef>;
  static auto* functions = new std::vector<PyMethodDef>;
  collect_ops_0(*methods, *functions);
  collect_ops_1(*methods, *functions);
  collect_ops_2(*methods, *functions);
  collect_ops_3(*methods, *functions);
  collect_ops_4(*methods, *functions);
  collect_ops_5(*methods, *functions);
  functions->push_back({nullptr, nullptr, 0, nullptr});
  add_tensor_type(m.ptr(), *methods);
  nb::module_ ops = m.def_submodule("_ops", "Every op of the table as a function.");
  if (PyModule_AddFunctions(ops.ptr(), functions->data()) < 0) throw nb::python_error();
}

/// A copy in page-locked memory, with the same strides; `t` itself if it is there already.
Tensor pinned_copy(const Tensor& t) {
  check(t.device().is_cpu(), "cannot pin '", t.device(), "' only dense CPU tensors can be pinned");
  DeviceBackend* backend = backend_for(DeviceType::CUDA);
  check(backend && backend->count() > 0,
        "Cannot pin memory: no CUDA device can be used: ", backend_problem(DeviceType::CUDA));
  if (t.numel() > 0 && backend->is_pinned(t.data())) return t;
  const Tensor like = empty_like(t);
  auto storage = make_ref<Storage>(backend->allocate_pinned(like.storage()->nbytes()), Device{});
  auto impl = make_ref<TensorImpl>(std::move(storage), t.dtype(), Device{});
  impl->set_geometry(like.sizes(), like.strides(), 0);
  const Tensor out{std::move(impl)};
  const NoGrad no_grad;
  ops::copy_(out, t, false);
  return out;
}

/// Waits for a device go on without the GIL. Not every thread that waits has it: other code may
/// have let go of it as well, which Python tells by a function outside the limited API.
void* release_gil() {
  static const auto holds_gil =
      reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  if (gil_released || !PyGILState_GetThisThreadState() || (holds_gil && !holds_gil()))
    return nullptr;
  gil_released = true;
  return PyEval_SaveThread();
}
void take_gil_back(void* state) {
  PyEval_RestoreThread(static_cast<PyThreadState*>(state));
  gil_released = false;
}

}  // namespace

NB_MODULE(_C, m) {
  // What is alive when the process ends need not be a leak: a captured method lives in its class.
  nb::set_leak_warnings(false);
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const PythonError&) {
      // Already set.
    } catch (const Error&) {
      raise_current();
    }
  });
  set_host_wait_hooks({release_gil, take_gil_back});
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&finish_backends));
  nb::module_::import_("os").attr("register_at_fork")(nb::arg("before") =
                                                          nb::cpp_function(&before_fork));
  cpu::load_backend();
  add_value_types(m.ptr());
  add_ops(m);
  if (PyModule_AddFunctions(m.ptr(), conversion_functions) < 0) throw nb::python_error();
  add_autograd(m.ptr());
  add_function(m.ptr());
  add_dispatch(m.ptr());
  out_of_memory_error = PyErr_NewExceptionWithDoc(
      "vibetensor.OutOfMemoryError", "A device or the host has no memory left for a tensor.",
      PyExc_RuntimeError, nullptr);
  m.attr("OutOfMemoryError") = nb::borrow(out_of_memory_error);

  m.def("get_num_threads", [] { return num_threads(); }, "Threads that kernels use.");
  m.def(
      "set_num_threads",
      [](int n) {
        if (n < 1) throw std::runtime_error("set_num_threads expects a positive integer");
        set_num_threads(n);
      },
      "Sets the number of threads that kernels use.");
  m.def(
      "_default_generator",
      [](nb::object device) {
        const Device where = device.is_none() ? Device{} : device_of(device.ptr());
        return nb::steal(wrap_generator(default_generator(where)));
      },
      nb::arg("device") = nb::none());
  m.def("_pin_memory",
        [](nb::object tensor) { return nb::steal(wrap(pinned_copy(tensor_of(tensor.ptr())))); });
  m.def("_record_stream", [](nb::object tensor, int device, uintptr_t stream) {
    const Tensor& t = tensor_of(tensor.ptr());
    check(t.device().is_cuda(), "record_stream: expected a CUDA tensor, got one on ", t.device());
    backend_for(t.device().type)->record_stream(*t.storage(), device, stream);
  });
  m.def("_is_pinned", [](nb::object tensor) {
    const Tensor& t = tensor_of(tensor.ptr());
    DeviceBackend* backend = t.device().is_cpu() ? backend_for(DeviceType::CUDA) : nullptr;
    return backend && t.numel() > 0 && backend->is_pinned(t.data());
  });
  m.def(
      "_rng_states",
      [] {
        nb::list states;
        for (const Generator* g : default_generators()) {
          const PhiloxArgs state = (*g)->state();
          states.append(nb::make_tuple(state.seed, state.offset));
        }
        return states;
      },
      "(seed, offset) of every device's default generator, the CPU's first.");
  m.def("_set_rng_states", [](nb::list states) {
    const std::vector<const Generator*> generators = default_generators();
    if (states.size() != generators.size())
      throw nb::value_error("expected the state of every device's default generator");
    for (size_t i = 0; i < generators.size(); ++i) {
      (*generators[i])
          ->set_state(nb::cast<uint64_t>(states[i][0]), nb::cast<uint64_t>(states[i][1]));
    }
  });
  m.def("_manual_seed", [](uint64_t seed) { manual_seed(seed); });
  m.def(
      "get_default_dtype", [] { return nb::steal(wrap_dtype(default_dtype())); },
      "The dtype of new floating tensors.");
  m.def("_kernel_switches", &kernel_switches, "The switches that kernels look at, a bit each.");
  m.def("_kernel_switches_on", &kernel_switches_on, "The names of those that are on.");
  m.def(
      "_kernel_switch",
      [](const std::string& name) { return kernel_switch(kernel_switch_named(name)); },
      nb::arg("name"), "Whether one of them is on.");
  m.def(
      "_set_kernel_switch",
      [](const std::string& name, bool on) { set_kernel_switch(kernel_switch_named(name), on); },
      nb::arg("name"), nb::arg("on"), "Sets one for the process.");
  m.def("_set_default_dtype", [](nb::object dtype) {
    if (!is_dtype(dtype.ptr())) throw nb::type_error("set_default_dtype expects a torch.dtype");
    set_default_dtype(dtype_of(dtype.ptr()));
  });
  m.def(
      "get_default_device", [] { return nb::steal(wrap_device(resolve_device(default_device()))); },
      "The device of new tensors that name none, on the calling thread.");
  m.def(
      "_set_default_device",
      [](nb::object device) {
        if (device.is_none()) {
          default_device_choice = {};
          return;
        }
        PyObject* given = device.ptr();
        if (!is_device(given) && !PyUnicode_Check(given) && !PyLong_Check(given))
          throw nb::type_error("set_default_device: expected a torch.device, a string or an index");
        set_default_device(unresolved_device_arg(given));
      },
      nb::arg("device").none());
  m.def("_cpu_memory_stats", [] {
    const cpu::AllocatorStats stats = cpu::allocator_stats();
    nb::dict out;
    out["allocated_bytes"] = stats.allocated;
    out["cached_bytes"] = stats.cached;
    out["peak_bytes"] = stats.peak;
    return out;
  });
  m.def("_cpu_reset_peak_memory", [] { cpu::reset_peak_stats(); });
  m.def("_cpu_empty_cache", [] { cpu::empty_cache(); });
  m.def(
      "_cpu_capability", [] { return cpu::backend_isa(); },
      "The instruction set that CPU kernels were chosen for.");
  bind_build_info(m);
  bind_safetensors(m);
  bind_graphs(m);
  bind_nvtx(m);
}

}  // namespace vt::python
