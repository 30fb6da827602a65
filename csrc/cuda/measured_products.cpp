#include "cuda/measured_products.h"

#include <map>
#include <mutex>

#include "core/environment.h"
#include "core/error.h"
#include "cuda/cublaslt.h"

namespace vt::cuda {
namespace {

/// Files may have a hundred thousand rows. Never destroyed: threads may make plans as the process
/// ends.
struct Added {
  std::mutex mutex;
  std::map<std::string, std::map<ProductSignature, AlgorithmConfiguration>, std::less<>> rows;
};
Added& added() {
  static auto* const instance = new Added;
  return *instance;
}

std::atomic<bool>& enabled() {
  static std::atomic<bool> value{env_flag("VT_MEASURED_PRODUCTS", true)};
  return value;
}

void changed() { detail::measured_products_version.fetch_add(1, std::memory_order_acq_rel); }

}  // namespace

std::string describe(const AlgorithmConfiguration& c) {
  std::string text = str("algorithm ", c.id, ", tile ", c.tile, ", stages ", c.stages);
  if (c.split_k > 1) append(text, str(", split-K ", c.split_k, " (reduction ", c.reduction, ")"));
  if (c.swizzle) append(text, str(", swizzle ", c.swizzle));
  if (c.custom) append(text, str(", option ", c.custom));
  if (c.inner) append(text, str(", inner shape ", c.inner));
  if (c.cluster) append(text, str(", cluster ", c.cluster));
  return text;
}

std::string describe(const ProductSignature& p) {
  std::string text = str(p.flags & kTf32 ? "tf32" : dtype_name(p.dtype), " ",
                         p.flags & kTransposeB ? "t" : "n", p.flags & kTransposeA ? "t" : "n",
                         " batch=", p.batch, " m=", p.m, " n=", p.n, " k=", p.k);
  if (p.flags & kBias) append(text, ", bias");
  switch (static_cast<GemmEpilogue>(p.epilogue)) {
    case GemmEpilogue::None:
      break;
    case GemmEpilogue::Relu:
      append(text, ", relu");
      break;
    case GemmEpilogue::GeluTanh:
      append(text, ", gelu_tanh");
      break;
    case GemmEpilogue::GeluTanhBackward:
      append(text, ", gelu_tanh_backward");
      break;
  }
  if (p.flags & kAccumulate) append(text, ", added");
  return text;
}

std::optional<AlgorithmConfiguration> measured_algorithm(std::string_view gpu,
                                                         const ProductSignature& product) {
  if (!measured_products_enabled()) return std::nullopt;
  {
    const std::lock_guard lock(added().mutex);
    if (const auto of_gpu = added().rows.find(gpu); of_gpu != added().rows.end()) {
      if (const auto row = of_gpu->second.find(product); row != of_gpu->second.end())
        return row->second;
    }
  }
  for (const MeasuredProduct& row : compiled_products()) {
    if (row.product == product && gpu == row.gpu) return row.algorithm;
  }
  return std::nullopt;
}

void add_measured_products(const std::string& gpu, std::span<const AddedProduct> rows) {
  {
    const std::lock_guard lock(added().mutex);
    auto& of_gpu = added().rows[gpu];
    for (const AddedProduct& row : rows) of_gpu.insert_or_assign(row.product, row.algorithm);
  }
  changed();
}

void remove_added_products() {
  {
    const std::lock_guard lock(added().mutex);
    added().rows.clear();
  }
  changed();
}

bool measured_products_enabled() { return enabled().load(std::memory_order_relaxed); }
void enable_measured_products(bool on) {
  if (enabled().exchange(on, std::memory_order_relaxed) != on) changed();
}

}  // namespace vt::cuda
