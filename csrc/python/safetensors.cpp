// vibetensor._C.safetensors: the Safetensors reader and writer over Python buffers. Tensors are
// made from these buffers, and turned into them, on the Python side (vibetensor/io/safetensors.py).
#include "python/safetensors.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cerrno>
#include <memory>
#include <span>
#include <system_error>

#include "io/atomic_file.h"
#include "io/safetensors.h"
#include "python/python.h"

namespace nb = nanobind;

namespace vt::python {
namespace {

using Buffer = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MappedBytes = nb::ndarray<nb::memview, uint8_t, nb::ndim<1>, nb::device::cpu>;
/// name, dtype code, shape, bytes
using TensorArgument = std::tuple<std::string, std::string, std::vector<int64_t>, Buffer>;

/// The exception classes live as long as the process, like those built into Python.
PyObject* base_class = nullptr;
std::array<PyObject*, io::kNumSafetensorFaults> fault_classes{};

std::span<const std::byte> bytes_of(const Buffer& buffer) {
  return {reinterpret_cast<const std::byte*>(buffer.data()), buffer.size()};
}

/// Runs `f` and turns what it throws into the Python exception a caller expects.
template <class F>
auto translated(F&& f) {
  try {
    return f();
  } catch (const io::SafetensorError& error) {
    PyErr_SetString(fault_classes[static_cast<std::size_t>(error.fault())], error.what());
  } catch (const std::system_error& error) {
    // OSError(errno, text) becomes FileNotFoundError, PermissionError, … by its errno.
    const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
  throw nb::python_error();
}

nb::tuple header_to_python(const io::SafetensorHeader& header) {
  nb::list tensors;
  for (const auto& tensor : header.tensors) {
    nb::list shape;
    for (const int64_t size : tensor.shape) shape.append(size);
    const auto code = io::dtype_code(tensor.dtype);
    tensors.append(nb::make_tuple(nb::str(tensor.name.data(), tensor.name.size()),
                                  nb::str(code.data(), code.size()), shape, tensor.begin,
                                  tensor.end));
  }
  nb::object metadata = nb::none();
  if (header.metadata) {
    nb::dict entries;
    for (const auto& [key, value] : *header.metadata)
      entries[nb::str(key.data(), key.size())] = nb::str(value.data(), value.size());
    metadata = entries;
  }
  return nb::make_tuple(header.data_start, metadata, tensors);
}

io::SafetensorDtype dtype_argument(const std::string& name, const std::string& code) {
  if (const auto dtype = io::dtype_from_code(code)) return *dtype;
  throw io::SafetensorError(io::SafetensorFault::UnknownDtype,
                            "tensor '" + name + "' has the unknown dtype '" + code + "'");
}

std::vector<io::TensorBytes> tensor_arguments(const std::vector<TensorArgument>& arguments) {
  std::vector<io::TensorBytes> tensors;
  tensors.reserve(arguments.size());
  for (const auto& [name, code, shape, buffer] : arguments)
    tensors.push_back({name, dtype_argument(name, code), shape, bytes_of(buffer)});
  return tensors;
}

std::optional<io::Metadata> metadata_argument(const std::optional<nb::dict>& dict) {
  if (!dict) return std::nullopt;
  io::Metadata metadata;
  for (const auto [key, value] : *dict) {
    if (!nb::isinstance<nb::str>(key) || !nb::isinstance<nb::str>(value))
      throw io::SafetensorError(io::SafetensorFault::InvalidMetadata,
                                "metadata must map strings to strings");
    metadata.emplace_back(nb::cast<std::string>(key), nb::cast<std::string>(value));
  }
  return metadata;
}

nb::tuple open_file(const nb::bytes& path) {
  auto file = translated([&] {
    const ReleaseGil unlocked(ReleaseGil::kWorthwhile);
    return std::make_unique<io::MappedFile>(std::string(path.c_str(), path.size()));
  });
  const auto bytes = file->bytes();
  const io::SafetensorHeader header = translated([&] {
    const ReleaseGil unlocked(ReleaseGil::kWorthwhile);
    return io::read_header(bytes);
  });
  const nb::capsule owner(file.get(), [](void* p) noexcept {
    const std::unique_ptr<io::MappedFile> mapped(static_cast<io::MappedFile*>(p));
  });
  file.release();
  const MappedBytes view(reinterpret_cast<uint8_t*>(bytes.data()), {bytes.size()}, owner);
  return nb::make_tuple(nb::cast(view), header_to_python(header));
}

nb::tuple parse_header(const Buffer& file) {
  return header_to_python(translated([&] { return io::read_header(bytes_of(file)); }));
}

void save(const nb::bytes& path, const std::vector<TensorArgument>& arguments,
          const std::optional<nb::dict>& metadata) {
  translated([&] {
    auto tensors = tensor_arguments(arguments);
    const auto entries = metadata_argument(metadata);
    const std::string target(path.c_str(), path.size());
    const ReleaseGil unlocked(ReleaseGil::kWorthwhile);
    io::save_safetensors(target, std::move(tensors), entries);
  });
}

nb::bytes serialize(const std::vector<TensorArgument>& arguments,
                    const std::optional<nb::dict>& metadata) {
  const std::string bytes = translated([&] {
    return io::serialize_safetensors(tensor_arguments(arguments), metadata_argument(metadata));
  });
  return nb::bytes(bytes.data(), bytes.size());
}

PyObject* new_exception(nb::module_& module, const char* name, PyObject* base) {
  const std::string qualified = std::string("vibetensor.io.safetensors.") + name;
  PyObject* type = PyErr_NewException(qualified.c_str(), base, nullptr);
  if (!type) throw nb::python_error();
  module.attr(name) = nb::borrow(type);
  return type;
}

}  // namespace

void bind_safetensors(nb::module_& parent) {
  nb::module_ module = parent.def_submodule("safetensors", "Safetensors files over buffers.");
  base_class = new_exception(module, "SafetensorError", PyExc_Exception);
  for (int i = 0; i < io::kNumSafetensorFaults; ++i) {
    const char* name = io::fault_name(static_cast<io::SafetensorFault>(i));
    fault_classes[static_cast<std::size_t>(i)] = new_exception(module, name, base_class);
  }
  module.def("open_file", &open_file, nb::arg("path"),
             "Maps and checks a file: (memoryview of all its bytes, header).");
  module.def(
      "parse_header", &parse_header, nb::arg("file"),
      "Checks the bytes of a file: (data_start, metadata, [(name, dtype, shape, begin, end)]).");
  module.def("save", &save, nb::arg("path"), nb::arg("tensors"), nb::arg("metadata").none(),
             "Writes [(name, dtype, shape, bytes)] atomically.");
  module.def("serialize", &serialize, nb::arg("tensors"), nb::arg("metadata").none(),
             "The bytes that save would write.");
}

}  // namespace vt::python
