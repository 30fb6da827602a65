// vibetensor._cuda: devices, streams, events and libraries of the CUDA backend. Tensors never pass
// through it: ops on them are in _C, on every device.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include "core/error.h"
#include "core/generator.h"
#include "core/host_wait.h"
#include "cuda/allocator.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/library.h"
#include "cuda/preload.h"
#include "cuda/repeated_launch.h"
#include "cuda/stream.h"
#include "cuda/sync.h"
#include "python/cuda/bindings.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

Stream stream_of(int device, uintptr_t handle) {
  return {reinterpret_cast<cudaStream_t>(handle), device};
}
uintptr_t number(Stream stream) { return reinterpret_cast<uintptr_t>(stream.handle); }

nb::object finder;  // Python: name -> path or None

std::string find_library(const char* name) {
  const nb::gil_scoped_acquire gil;
  const nb::object path = finder(name);
  return path.is_none() ? std::string() : nb::cast<std::string>(path);
}

void bind_devices(nb::module_& m) {
  nb::class_<DeviceProperties>(m, "_CudaDeviceProperties", "What the driver says of a device.")
      .def_ro("name", &DeviceProperties::name)
      .def_ro("major", &DeviceProperties::major)
      .def_ro("minor", &DeviceProperties::minor)
      .def_ro("multi_processor_count", &DeviceProperties::multiprocessors)
      .def_ro("total_memory", &DeviceProperties::total_memory)
      .def_ro("L2_cache_size", &DeviceProperties::l2_cache)
      .def_ro("shared_memory_per_block_optin", &DeviceProperties::shared_memory_per_block)
      .def_ro("max_threads_per_multi_processor", &DeviceProperties::max_threads_per_sm)
      .def_ro("warp_size", &DeviceProperties::warp_size)
      .def_ro("pci_bus_id", &DeviceProperties::pci_bus)
      .def_ro("pci_device_id", &DeviceProperties::pci_device)
      .def_ro("pci_domain_id", &DeviceProperties::pci_domain)
      .def("__repr__", [](const DeviceProperties& p) {
        return str("_CudaDeviceProperties(name='", p.name, "', major=", p.major,
                   ", minor=", p.minor, ", total_memory=", p.total_memory / (1 << 20),
                   "MB, multi_processor_count=", p.multiprocessors,
                   ", L2_cache_size=", p.l2_cache / (1 << 20), "MB)");
      });
  m.def("device_count", &device_count);
  m.def("device_problem", &device_problem);
  m.def("current_device", &current_device);
  m.def("set_device", [](int device) {
    checked_device(device);
    const HostWait waiting;  // the first time starts the device
    set_device(device);
  });
  m.def(
      "properties", [](int device) { return &properties(checked_device(device)); },
      nb::rv_policy::reference);
  m.def("can_access_peer", &can_access_peer);
  m.def("synchronize_device", [](int device) { synchronize_device(checked_device(device)); });
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);
  m.def("built_architectures", &built_architectures);
  m.def("memory_info", [](int device) {
    const MemoryInfo info = memory_info(checked_device(device));
    return std::pair(info.free, info.total);
  });
}

void bind_streams(nb::module_& m) {
  m.def("current_stream",
        [](int device) { return number(current_stream(checked_device(device))); });
  m.def("set_current_stream", [](int device, uintptr_t handle) {
    set_current_stream(stream_of(checked_device(device), handle));
  });
  m.def("pool_stream", [](int device, int priority) {
    checked_device(device);
    const HostWait waiting;  // the first one starts the device
    return number(pool_stream(device, priority));
  });
  m.def("priority_range", [] {
    int lowest = 0, highest = 0;
    priority_range(&lowest, &highest);
    return std::pair(lowest, highest);
  });
  m.def("stream_query",
        [](int device, uintptr_t handle) { return query(stream_of(device, handle)); });
  m.def("stream_is_captured",
        [](int device, uintptr_t handle) { return is_captured(stream_of(device, handle)); });
  m.def("stream_priority",
        [](int device, uintptr_t handle) { return priority(stream_of(device, handle)); });
  m.def("stream_synchronize",
        [](int device, uintptr_t handle) { synchronize(stream_of(device, handle)); });
  m.def("release_stream", [](int device, uintptr_t handle) {
    release_stream(stream_of(checked_device(device), handle));
  });
  nb::class_<Event>(m, "Event")
      .def(nb::init<bool, bool, bool>(), nb::arg("timing"), nb::arg("blocking"),
           nb::arg("interprocess"))
      .def("record",
           [](Event& e, int device, uintptr_t handle) { e.record(stream_of(device, handle)); })
      .def("wait",
           [](const Event& e, int device, uintptr_t handle) { e.wait(stream_of(device, handle)); })
      .def("query", &Event::query)
      .def("synchronize", &Event::synchronize)
      .def("elapsed_time", &Event::elapsed)
      .def_prop_ro("handle", [](const Event& e) { return reinterpret_cast<uintptr_t>(e.handle()); })
      .def_prop_ro("device", &Event::device);
}

}  // namespace

int checked_device(int device) {
  check(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", device,
        "; there are ", device_count(), " devices", device_count() == 0 ? ": " : "",
        device_problem());
  return device;
}

}  // namespace vt::cuda

NB_MODULE(_cuda, m) {
  using namespace vt;
  // Its translator of errors serves this module too: nanobind's modules share one list.
  nb::module_::import_("vibetensor._C");
  cuda::bind_devices(m);
  cuda::bind_memory(m);
  cuda::bind_memory_history(m);
  cuda::bind_streams(m);
  cuda::bind_libraries(m);
  cuda::bind_cute(m);
  cuda::bind_products(m);
  m.def(
      "set_library_finder",
      [](nb::object f) {
        cuda::finder = std::move(f);
        cuda::set_library_finder(cuda::finder.is_none() ? nullptr : &cuda::find_library);
      },
      nb::arg().none());
  // The module outlives every call of the finder and of what memory reports to, but not the
  // interpreter.
  nb::module_::import_("atexit").attr("register")(nb::cpp_function([] {
    cuda::finish_preloads();  // they may look for a library
    cuda::close_memory();
    cuda::set_library_finder(nullptr);
    cuda::finder.reset();
  }));
  m.def("built_architectures", &cuda::built_architectures);
  m.def("sync_debug_mode", [] { return static_cast<int>(cuda::sync_debug()); });
  m.def("set_sync_debug_mode", [](int mode) {
    if (mode < 0 || mode > 2) throw nb::value_error("sync debug mode is 0, 1 or 2");
    cuda::set_sync_debug(static_cast<cuda::SyncDebug>(mode));
    cuda::set_sync_warning([](const char* message) {
      const nb::gil_scoped_acquire gil;
      if (PyErr_WarnEx(PyExc_UserWarning, message, 1) == 0) return;
      PyErr_Clear();  // a filter made it an error: one of ours, which any caller understands
      fail(message);
    });
  });
  m.def("implicit_syncs", &cuda::implicit_syncs);
  m.def("launch_graphs", &cuda::launch_graphs);
  m.def("cublaslt_version", &cuda::cublaslt_version);
}
