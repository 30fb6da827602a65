// Measured algorithms of cuBLASLt: rows, the products that were seen, and trials of their answers.
// A product crosses as (dtype, layout, epilogue, bias, accumulate, batch, m, n, k), a configuration
// as the nine numbers of kConfiguration; vibetensor.cute_kernels.product_table names them.
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "core/error.h"
#include "core/kernel_switches.h"
#include "cuda/measured_products.h"
#include "cuda/product_trial.h"
#include "cuda/stream.h"
#include "python/cuda/bindings.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

using Product = std::tuple<std::string, std::string, std::string, bool, bool, int64_t, int64_t,
                           int64_t, int64_t>;
/// lda, ldb, ldc, and the steps from matrix to matrix of a batch.
using Strides = std::array<int64_t, 6>;
/// id, tile, stages, split_k, reduction, swizzle, custom, inner, cluster.
using Configuration = std::array<int64_t, 9>;

constexpr std::pair<std::string_view, DType> kDTypes[] = {{"bf16", DType::BFloat16},
                                                          {"f16", DType::Float16},
                                                          {"f32", DType::Float32},
                                                          {"f64", DType::Float64}};
constexpr std::pair<std::string_view, GemmEpilogue> kEpilogues[] = {
    {"", GemmEpilogue::None},
    {"relu", GemmEpilogue::Relu},
    {"gelu_tanh", GemmEpilogue::GeluTanh},
    {"gelu_tanh_backward", GemmEpilogue::GeluTanhBackward}};

ProductSignature signature_from(const Product& given) {
  const auto& [dtype, layout, epilogue, bias, accumulate, batch, m, n, k] = given;
  ProductSignature p{.batch = batch, .m = m, .n = n, .k = k};
  check(batch > 0 && m > 0 && n > 0 && k > 0, "the extents of a measured product are positive");
  const std::string_view name = dtype == "tf32" ? "f32" : std::string_view(dtype);
  const auto* type = std::ranges::find(kDTypes, name, [](const auto& d) { return d.first; });
  if (type == std::end(kDTypes)) fail(ErrorKind::Value, "no product is measured in '", dtype, "'");
  p.dtype = type->second;
  const auto* kind = std::ranges::find(kEpilogues, std::string_view(epilogue),
                                       [](const auto& e) { return e.first; });
  if (kind == std::end(kEpilogues))
    fail(ErrorKind::Value, "no epilogue is called '", epilogue, "'");
  p.epilogue = static_cast<int32_t>(kind->second);
  if (layout != "tn" && layout != "nn" && layout != "nt" && layout != "tt")
    fail(ErrorKind::Value, "no layout is called '", layout, "'");
  p.flags = (layout[0] == 't' ? kTransposeB : 0) | (layout[1] == 't' ? kTransposeA : 0) |
            (bias ? kBias : 0) | (dtype == "tf32" ? kTf32 : 0) | (accumulate ? kAccumulate : 0);
  return p;
}

Product named(const ProductSignature& p) {
  std::string dtype, epilogue;
  for (const auto& [name, type] : kDTypes) {
    if (type == p.dtype) dtype = p.flags & kTf32 ? std::string_view("tf32") : name;
  }
  for (const auto& [name, kind] : kEpilogues) {
    if (static_cast<int32_t>(kind) == p.epilogue) epilogue = name;
  }
  const std::string layout = {p.flags & kTransposeB ? 't' : 'n', p.flags & kTransposeA ? 't' : 'n'};
  return {dtype, layout, epilogue, (p.flags & kBias) != 0, (p.flags & kAccumulate) != 0, p.batch,
          p.m,   p.n,    p.k};
}

template <class To>
To narrow(int64_t value) {
  if (!std::in_range<To>(value))
    fail(ErrorKind::Value, value, " is out of range in an algorithm's configuration");
  return static_cast<To>(value);
}
AlgorithmConfiguration configuration_from(const Configuration& c) {
  AlgorithmConfiguration out;
  out.id = narrow<int32_t>(c[0]);
  out.tile = narrow<uint32_t>(c[1]);
  out.stages = narrow<uint32_t>(c[2]);
  out.split_k = narrow<int32_t>(c[3]);
  out.reduction = narrow<uint32_t>(c[4]);
  out.swizzle = narrow<uint32_t>(c[5]);
  out.custom = narrow<uint32_t>(c[6]);
  out.inner = narrow<uint16_t>(c[7]);
  out.cluster = narrow<uint16_t>(c[8]);
  return out;
}
Configuration numbers(const AlgorithmConfiguration& c) {
  return {c.id, c.tile, c.stages, c.split_k, c.reduction, c.swizzle, c.custom, c.inner, c.cluster};
}

/// Within the scope float32 products are as the product's dtype says.
KernelSwitchesAs switches_of(const ProductSignature& p) {
  constexpr auto tf32 = static_cast<uint32_t>(KernelSwitch::MatmulTf32);
  return KernelSwitchesAs((kernel_switches() & ~tf32) | (p.flags & kTf32 ? tf32 : 0));
}

/// A trial over memory that Python keeps.
class PythonTrial {
 public:
  PythonTrial(const Product& product, const Strides& strides,
              const std::array<uintptr_t, 5>& addresses, int device)
      : signature_(signature_from(product)), device_(checked_device(device)) {
    const auto [a, b, c, bias, aux] = addresses;
    const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    GemmProblem p{.dtype = signature_.dtype,
                  .batch = signature_.batch,
                  .m = signature_.m,
                  .n = signature_.n,
                  .k = signature_.k};
    p.a = {pointer(a), strides[0], strides[3], (signature_.flags & kTransposeA) != 0};
    p.b = {pointer(b), strides[1], strides[4], (signature_.flags & kTransposeB) != 0};
    p.c = pointer(c);
    p.ldc = strides[2];
    p.step_c = strides[5];
    p.beta = signature_.flags & kAccumulate ? 1 : 0;
    p.epilogue = static_cast<GemmEpilogue>(signature_.epilogue);
    const bool has_aux =
        p.epilogue == GemmEpilogue::GeluTanh || p.epilogue == GemmEpilogue::GeluTanhBackward;
    check((bias != 0) == ((signature_.flags & kBias) != 0) && (aux != 0) == has_aux,
          "a trial has a bias and a saved tensor where its product has them");
    p.bias = pointer(bias);
    p.aux = pointer(aux);
    const KernelSwitchesAs switches = switches_of(signature_);
    trial_ = std::make_unique<ProductTrial>(p, device_);
  }
  std::vector<Configuration> configurations() const {
    std::vector<Configuration> out;
    for (size_t i = 0; i < trial_->answers(); ++i) out.push_back(numbers(trial_->configuration(i)));
    return out;
  }
  size_t workspace(size_t answer) const { return trial_->workspace(answer); }
  void run(size_t answer) const { trial_->run(answer, current_stream(device_).handle); }

 private:
  ProductSignature signature_;
  int device_;
  std::unique_ptr<ProductTrial> trial_;
};

}  // namespace

void bind_products(nb::module_& m) {
  m.def("measured_products_enabled", &measured_products_enabled);
  m.def("enable_measured_products", &enable_measured_products);
  m.def("add_measured_products",
        [](const std::string& gpu, const std::vector<std::pair<Product, Configuration>>& given) {
          std::vector<AddedProduct> rows;
          for (const auto& [product, configuration] : given)
            rows.push_back({signature_from(product), configuration_from(configuration)});
          add_measured_products(gpu, rows);
        });
  m.def("remove_added_products", &remove_added_products);
  m.def("compiled_products", [] {
    nb::list out;
    for (const MeasuredProduct& row : compiled_products())
      out.append(nb::make_tuple(row.gpu, named(row.product), numbers(row.algorithm)));
    return out;
  });
  m.def("measured_algorithm", [](const std::string& gpu, const Product& product) -> nb::object {
    const auto found = measured_algorithm(gpu, signature_from(product));
    return found ? nb::cast(numbers(*found)) : nb::none();
  });
  m.def("seen_products", [] {
    nb::list out;
    for (const SeenProduct& s : seen_products())
      out.append(nb::make_tuple(named(s.product),
                                Strides{s.lda, s.ldb, s.ldc, s.step_a, s.step_b, s.step_c},
                                s.alignment, s.device));
    return out;
  });
  nb::class_<PythonTrial>(m, "ProductTrial",
                          "A product whose answers run one by one; number 0 is what it gets "
                          "without a row. Addresses of a, b, c, bias, aux, 0 for none.")
      .def(nb::init<const Product&, const Strides&, const std::array<uintptr_t, 5>&, int>())
      .def_prop_ro("configurations", &PythonTrial::configurations)
      .def("workspace", &PythonTrial::workspace)
      .def("run", &PythonTrial::run);
}

}  // namespace vt::cuda
