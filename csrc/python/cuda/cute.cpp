// CuTe kernels by name: what is compiled in, what a call would get, and launches of one variant for
// tests and measurements; and kernels that come while the program runs. Tensors arrive as (address,
// dtype, strides): of rows, or of all dimensions but the last.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cstdio>

#include "core/error.h"
#include "cuda/cute/late_code.h"
#include "cuda/cute/launch_table.h"
#include "cuda/cute/loaded_kernel.h"
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

cute::Operand operand_of(std::string_view kernel, std::string_view name, const Place& place) {
  const auto& [address, dtype, strides] = place;
  cute::Operand t(reinterpret_cast<const void*>(address), dtype_named(dtype));
  if (const auto* rows = std::get_if<int64_t>(&strides)) {
    t.strides[0] = *rows;
    return t;
  }
  const auto& all = std::get<std::vector<int64_t>>(strides);
  if (all.size() > t.strides.size())
    fail(ErrorKind::Value, kernel, ": ", name, " has ", all.size(), " strides, at most ",
         t.strides.size(), " are taken");
  std::ranges::copy(all, t.strides.begin());
  return t;
}

cute::Scalar scalar_of(cute::ScalarType type, nb::handle value) {
  cute::Scalar s{.u64 = 0};
  switch (type) {
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
  return s;
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
      tensors.push_back(operand_of(kernel.name, name, found->second));
    }
  }
  void set_scalars(const Kernel& kernel, const nb::dict& given) {
    for (size_t i = 0; i < kernel.scalar_names.size(); ++i) {
      const char* name = kernel.scalar_names[i];
      if (!given.contains(name)) fail(ErrorKind::Type, kernel.name, " needs the number ", name);
      scalars.push_back(scalar_of(kernel.scalar_types[i], given[name]));
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

using ExtentLimits = std::tuple<int64_t, int64_t, int64_t>;
/// dtype, extents, access, alignment, divisor of strides, optional, may_alias.
using TensorLimits =
    std::tuple<std::string, std::vector<uint8_t>, std::string, int16_t, int16_t, bool, uint32_t>;
/// Path of a shared library and the names of its functions: entry, init, load.
using Symbols = std::tuple<std::string, std::string, std::string, std::string>;

cute::ScalarType scalar_type_named(const std::string& name) {
  if (name == "float32") return cute::ScalarType::f32;
  if (name == "int32") return cute::ScalarType::i32;
  if (name == "int64") return cute::ScalarType::i64;
  if (name == "uint64") return cute::ScalarType::u64;
  fail(ErrorKind::Value, "no number of a CuTe kernel has the type '", name, "'");
}

cute::TensorRule rule_of(const TensorLimits& limits) {
  const auto& [dtype, extents, access, align, divisor, optional, alias] = limits;
  check(!extents.empty() && extents.size() <= cute::kMaxDims, "a tensor of a CuTe kernel has 1 to ",
        cute::kMaxDims, " dimensions, not ", extents.size());
  check(access == "read" || access == "write" || access == "update", "unknown access '", access,
        "'");
  check(align > 0 && divisor > 0, "alignments and divisors are positive");
  cute::TensorRule rule{.dtype = dtype_named(dtype),
                        .dims = static_cast<uint8_t>(extents.size()),
                        .extents = {},
                        .access = access == "read"    ? cute::Access::Read
                                  : access == "write" ? cute::Access::Write
                                                      : cute::Access::Update,
                        .align = align,
                        .stride_divisible_by = divisor,
                        .optional = optional,
                        .may_alias = alias};
  std::ranges::copy(extents, rule.extents);
  return rule;
}

void bind_loaded(nb::module_& m) {
  using cute::LoadedKernel;
  nb::class_<LoadedKernel>(m, "CuteKernel", "A CuTe kernel that was compiled apart.")
      .def(
          "__init__",
          [](LoadedKernel* self, std::string name, std::vector<std::string> extents,
             std::vector<std::string> tensors, const std::vector<std::string>& scalars) {
            std::vector<cute::ScalarType> types;
            for (const std::string& s : scalars) types.push_back(scalar_type_named(s));
            new (self) LoadedKernel(std::move(name), std::move(extents), std::move(tensors),
                                    std::move(types));
          },
          nb::arg("name"), nb::arg("extents"), nb::arg("tensors"), nb::arg("scalars"))
      .def(
          "add",
          [](LoadedKernel& self, std::string name, const std::vector<ExtentLimits>& extents,
             const std::vector<TensorLimits>& tensors, const Symbols& symbols) {
            std::vector<cute::ExtentRule> extent_rules;
            for (const auto& [divisor, low, high] : extents) {
              check(divisor > 0, "divisors are positive");
              extent_rules.push_back({divisor, low, high});
            }
            std::vector<cute::TensorRule> tensor_rules;
            for (const TensorLimits& t : tensors) tensor_rules.push_back(rule_of(t));
            const auto& [library, entry, init, load] = symbols;
            const cute::OpenedCode opened = cute::open_code(library, entry, init, load);
            self.add(std::move(name), std::move(extent_rules), std::move(tensor_rules), opened);
          },
          "Appends a variant; its rules, and where its functions are.")
      .def(
          "launch",
          [](LoadedKernel& self, const std::vector<int64_t>& extents, const nb::list& places,
             const nb::list& numbers, int device) -> std::pair<std::string, std::string> {
            check(extents.size() == self.extents() && places.size() == self.tensors() &&
                      numbers.size() == self.scalars().size(),
                  self.name(), " takes ", self.extents(), " extents, ", self.tensors(),
                  " tensors and ", self.scalars().size(), " numbers");
            std::vector<cute::Operand> tensors;
            for (const nb::handle place : places) {
              if (place.is_none())
                tensors.emplace_back();
              else
                tensors.push_back(operand_of(self.name(), "a tensor", nb::cast<Place>(place)));
            }
            std::vector<cute::Scalar> scalars;
            for (size_t i = 0; i < numbers.size(); ++i)
              scalars.push_back(scalar_of(self.scalars()[i], numbers[i]));
            const Launch on(Device{DeviceType::CUDA, static_cast<int8_t>(checked_device(device))});
            std::string why;
            const char* variant = self.launch({extents, tensors, scalars}, on, why);
            return variant ? std::pair(std::string(variant), std::string())
                           : std::pair(std::string(), why);
          },
          "Launches the first variant that applies on the device's current stream: its name, or an "
          "empty one and why none applies.");
}

/// A Python function (kernel, variant) -> symbols or None as what compiles missing variants.
void set_compiler(const nb::object& function) {
  if (function.is_none()) {
    cute::set_compiler(nullptr);
    return;
  }
  // Never freed: a launch may be under way as the interpreter ends.
  const auto* held = new nb::object(function);
  cute::set_compiler(
      [held](const char* kernel, const char* variant) -> std::optional<cute::OpenedCode> {
        const nb::gil_scoped_acquire gil;
        try {
          const nb::object found = (*held)(kernel, variant);
          if (found.is_none()) return std::nullopt;
          const auto [library, entry, init, load] = nb::cast<Symbols>(found);
          return cute::open_code(library, entry, init, load);
        } catch (const std::exception& error) {
          // The op has another kernel.
          std::fprintf(stderr, "vibetensor: CuTe %s %s: %s\n", kernel, variant, error.what());
          return std::nullopt;
        }
      });
}

}  // namespace

void bind_cute(nb::module_& m) {
  bind_loaded(m);
  m.def("set_cute_compiler", &set_compiler, nb::arg("function").none());
  m.def("cute_compiled_by", [] { return std::string(cute::compiled_by()); });
  m.def("cute_kernels", &describe_kernels);
  m.def("cute_mode", [] {
    switch (cute::mode()) {
      case cute::Mode::Off:
        return "off";
      case cute::Mode::Table:
        return "table";
      case cute::Mode::Model:
        return "model";
      case cute::Mode::All:
        return "all";
    }
    return "";
  });
  m.def("set_cute_mode", [](const std::string& name) {
    const auto mode = cute::mode_from(name);
    if (!mode)
      fail(ErrorKind::Value, "the mode must be off, table, model or all, got '", name, "'");
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
  m.def(
      "cute_choice",
      [](const std::string& kernel_name, const Extents& extents, const Tensors& tensors,
         const std::string& gpu, int major, int minor, int multiprocessors) {
        const Kernel& kernel = kernel_named(kernel_name);
        const NamedCall named(kernel, extents, tensors);
        const cute::Choice c =
            cute::chosen(kernel, named.call(), gpu, major, minor, multiprocessors);
        return c.variant < 0 ? std::string()
                             : std::string(kernel.variants[static_cast<size_t>(c.variant)].name);
      },
      nb::arg("kernel"), nb::arg("extents"), nb::arg("tensors"), nb::arg("gpu"), nb::arg("major"),
      nb::arg("minor"), nb::arg("multiprocessors") = 132);
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
