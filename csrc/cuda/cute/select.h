// Which variant of a CuTe kernel a call gets, if any. Needs no CUDA.
//
// By default only measured choices are made: a row of cute_kernels/tuning for the GPU at hand that
// covers the call's extents. VT_CUTE_KERNELS=model asks a model of products where no row does
// (model.h). VT_CUTE_KERNELS=all takes the first variant that applies wherever one does (a kernel
// lists its variants from the smallest capacity up), for tests and measurements.
#pragma once

#include <optional>
#include <string_view>

#include "cuda/cute/contract.h"
#include "cuda/cute/model.h"

namespace vt::cuda::cute {

enum class Mode : uint8_t { Off, Table, Model, All };

/// "off", "table" (also ""), "model", "all"; nullopt for anything else.
std::optional<Mode> mode_from(std::string_view text);

struct Range {
  int64_t low, high;  // closed
};
/// On GPU number `gpu` of tuned_gpus(), with all extents in their ranges, `variant` is the choice;
/// -1: the library's kernel, where the first tensor is of `dtype`.
struct TunedRow {
  int gpu, variant;
  std::array<Range, kMaxExtents> ranges;
  DType dtype = DType::Float32;
};

/// What choosing asks of a variant.
struct Rules {
  const ExtentRule* extents;
  const TensorRule* tensors;
  bool usable;  // compiled in
};

struct Choice {
  int variant = -1;  // -1: the library's kernel
  /// Where a variant was looked at and none applies: the last one looked at, and why not.
  int refused = -1;
  Refusal refusal;
  double predicted = 0;  // by the model: the fraction by which it is faster
  bool library = false;  // a row says that the library's kernel is the fastest
};

/// The GPU a call runs on: its number among those measured, -1 for another one.
struct Gpu {
  int number = -1;
  int multiprocessors = 0;
};

/// `rules(i)` for i < variants.
template <class RulesOf>
Choice choose(Mode mode, const Gpu& gpu, std::span<const TunedRow> tuned, const ProductModel& model,
              size_t variants, const RulesOf& rules, const Call& call) {
  Choice choice;
  const auto applies = [&](int variant) {
    const Rules r = rules(static_cast<size_t>(variant));
    const Refusal refusal =
        r.usable ? check_call(r.extents, r.tensors, call) : Refusal{Reason::NotCompiled, -1};
    if (!refusal) {
      choice.variant = variant;
      return true;
    }
    choice.refused = variant;
    choice.refusal = refusal;
    return false;
  };
  if (mode == Mode::Off) return choice;
  for (const TunedRow& row : tuned) {
    if (row.gpu != gpu.number) continue;
    bool inside = true;
    for (size_t i = 0; i < call.extents.size(); ++i)
      inside &= call.extents[i] >= row.ranges[i].low && call.extents[i] <= row.ranges[i].high;
    if (!inside) continue;
    if (row.variant < 0) {
      choice.library = mode != Mode::All && call.tensors[0].dtype == row.dtype;
      if (choice.library) return choice;
      continue;
    }
    if (applies(row.variant)) return choice;
  }
  if (mode == Mode::Model && !model.points.empty()) {
    const bool measured = gpu.number == model.gpu;
    const auto& e = call.extents;
    const auto predicted =
        model.predict({e[0], e[1], e[2], e[3]}, gpu.multiprocessors,
                      measured ? ProductModel::kMargin : ProductModel::kMarginElsewhere);
    if (predicted.variant >= 0 && applies(predicted.variant)) choice.predicted = predicted.gain;
    return choice;
  }
  if (mode != Mode::All) return choice;
  for (size_t i = 0; i < variants; ++i) {
    if (applies(static_cast<int>(i))) return choice;
  }
  return choice;
}

}  // namespace vt::cuda::cute
