// CuTe kernels by name: what is compiled in, what a call would get, and launches of one variant for
// tests and measurements. Tensors arrive as (address, dtype, strides): of rows, or of all
// dimensions but the last.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "core/error.h"
#include "cuda/cute/launch_table.h"
#include "python/cuda/bindings.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

using cute::Kernel;
using Extents = std::unordered_map<std::string, int64_t>;
using Strides = std::variant<int64_t, std::vector<int64_t>>;
using Place = std::tuple<uintptr_t, std::string, Strides>;
using Tensors = std::unordered_map<std::string, Place>;

const Kernel& kernel_named(const std::string& name) {
  for (const Kernel& k : cute::kernels()) {
    if (name == k.name) return k;
  }
  fail(ErrorKind::Value, "no CuTe kernel is called '", name, "'");
}

size_t variant_named(const Kernel& kernel, const std::string& name) {
  for (size_t i = 0; i < kernel.variants.size(); ++i) {
    if (name == kernel.variants[i].name) return i;
  }
  fail(ErrorKind::Value, kernel.name, " has no variant '", name, "'");
}

DType dtype_named(const std::string& name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (dtype_name(static_cast<DType>(i)) == name) return static_cast<DType>(i);
  }
  fail(ErrorKind::Value, "no dtype is called '", name, "'");
}

template <class Map>
void check_names(const Kernel& kernel, std::string_view what, std::span<const char* const> known,
                 const Map& given) {
  for (const auto& item : given) {
    if (std::ranges::none_of(known, [&](const char* name) { return item.first == name; }))
      fail(ErrorKind::Type, kernel.name, " has no ", what, " '", item.first, "'");
  }
}

/// A call by names, with the arrays behind it.
struct NamedCall {
  std::vector<int64_t> extents;
  std::vector<cute::Operand> tensors;
  std::vector<cute::Scalar> scalars;

  NamedCall(const Kernel& kernel, const Extents& sizes, const Tensors& places) {
    check_names(kernel, "extent", kernel.extent_names, sizes);
    check_names(kernel, "tensor", kernel.tensor_names, places);
    for (const char* name : kernel.extent_names) {
      const auto found = sizes.find(name);
      if (found == sizes.end()) fail(ErrorKind::Type, kernel.name, " needs the extent ", name);
      extents.push_back(found->second);
    }
    for (const char* name : kernel.tensor_names) {
      const auto found = places.find(name);
      if (found == places.end()) {
        tensors.emplace_back();
        continue;
      }
      const auto& [address, dtype, strides] = found->second;
      cute::Operand& t =
          tensors.emplace_back(reinterpret_cast<const void*>(address), dtype_named(dtype));
      if (const auto* rows = std::get_if<int64_t>(&strides)) {
        t.strides[0] = *rows;
        continue;
      }
      const auto& all = std::get<std::vector<int64_t>>(strides);
      if (all.size() > t.strides.size())
        fail(ErrorKind::Value, kernel.name, ": ", name, " has ", all.size(), " strides, at most ",
             t.strides.size(), " are taken");
      std::ranges::copy(all, t.strides.begin());
    }
  }
  void set_scalars(const Kernel& kernel, const nb::dict& given) {
    for (size_t i = 0; i < kernel.scalar_names.size(); ++i) {
      const char* name = kernel.scalar_names[i];
      if (!given.contains(name)) fail(ErrorKind::Type, kernel.name, " needs the number ", name);
      const nb::handle value = given[name];
      cute::Scalar s{.u64 = 0};
      switch (kernel.scalar_types[i]) {
        case cute::ScalarType::f32:
          s.f32 = nb::cast<float>(value);
          break;
        case cute::ScalarType::i32:
          s.i32 = nb::cast<int32_t>(value);
          break;
        case cute::ScalarType::i64:
          s.i64 = nb::cast<int64_t>(value);
          break;
        case cute::ScalarType::u64:
          s.u64 = nb::cast<uint64_t>(value);
          break;
      }
      scalars.push_back(s);
    }
    if (given.size() != scalars.size())
      fail(ErrorKind::Type, kernel.name, " takes ", scalars.size(), " numbers, not ", given.size());
  }
  cute::Call call() const { return {extents, tensors, scalars}; }
};

nb::list names_of(std::span<const char* const> names) {
  nb::list out;
  for (const char* name : names) out.append(name);
  return out;
}

nb::list describe_kernels() {
  nb::list out;
  for (const Kernel& k : cute::kernels()) {
    nb::dict kernel;
    nb::list variants;
    for (const cute::Variant& v : k.variants)
      variants.append(nb::make_tuple(v.name, v.enter != nullptr));
    kernel["name"] = k.name;
    kernel["extents"] = names_of(k.extent_names);
    kernel["tensors"] = names_of(k.tensor_names);
    kernel["scalars"] = names_of(k.scalar_names);
    kernel["variants"] = variants;
    kernel["measured"] = k.tuned.size();
    out.append(kernel);
  }
  return out;
}

std::string refusal_text(const Kernel& kernel, size_t variant, cute::Refusal refusal,
                         const cute::Call& call) {
  const cute::Variant& v = kernel.variants[variant];
  return cute::describe(refusal, v.extents, v.tensors, call, kernel.extent_names,
                        kernel.tensor_names);
}

}  // namespace

void bind_cute(nb::module_& m) {
  m.def("cute_compiled_by", [] { return std::string(cute::compiled_by()); });
  m.def("cute_kernels", &describe_kernels);
  m.def("cute_mode", [] {
    switch (cute::mode()) {
      case cute::Mode::Off:
        return "off";
      case cute::Mode::Table:
        return "table";
      case cute::Mode::All:
        return "all";
    }
    return "";
  });
  m.def("set_cute_mode", [](const std::string& name) {
    const auto mode = cute::mode_from(name);
    if (!mode) fail(ErrorKind::Value, "the mode must be off, table or all, got '", name, "'");
    cute::set_mode(*mode);
  });
  m.def("cute_refusal", [](const std::string& kernel_name, const std::string& variant_name,
                           const Extents& extents, const Tensors& tensors) {
    const Kernel& kernel = kernel_named(kernel_name);
    const size_t variant = variant_named(kernel, variant_name);
    const NamedCall named(kernel, extents, tensors);
    const cute::Variant& v = kernel.variants[variant];
    const cute::Refusal refusal = cute::check_call(v.extents, v.tensors, named.call());
    return refusal ? refusal_text(kernel, variant, refusal, named.call()) : std::string();
  });
  m.def("cute_choice", [](const std::string& kernel_name, const Extents& extents,
                          const Tensors& tensors, const std::string& gpu, int major, int minor) {
    const Kernel& kernel = kernel_named(kernel_name);
    const NamedCall named(kernel, extents, tensors);
    const cute::Choice c = cute::chosen(kernel, named.call(), gpu, major, minor);
    return c.variant < 0 ? std::string()
                         : std::string(kernel.variants[static_cast<size_t>(c.variant)].name);
  });
  m.def("cute_launch",
        [](const std::string& kernel_name, const std::string& variant_name, const Extents& extents,
           const Tensors& tensors, const nb::dict& scalars, int device) {
          const Kernel& kernel = kernel_named(kernel_name);
          NamedCall named(kernel, extents, tensors);
          named.set_scalars(kernel, scalars);
          const Launch on(Device{DeviceType::CUDA, static_cast<int8_t>(checked_device(device))});
          cute::launch_variant(kernel, variant_named(kernel, variant_name), named.call(), on);
        });
}

}  // namespace vt::cuda
