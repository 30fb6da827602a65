// _to_dtype: a converted copy with the same layout.
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

/// The pairs training converts often, by vector accesses: floats of all widths among each other,
/// bytes (images) and booleans (masks) to float types. False for other pairs.
bool convert_rows(const Launch& launch, TensorIterator& it) {
  const DType from = it.dtype(1), to = it.dtype(0);
  const auto run = [&]<class From, class To>() {
    return detail::run_rows<From, From, To, float, float, 1>(launch, it, from, Identity{});
  };
  const auto to_float = [&]<class From>() {
    return to == DType::Float32    ? run.template operator()<From, float>()
           : to == DType::BFloat16 ? run.template operator()<From, __nv_bfloat16>()
           : to == DType::Float16  ? run.template operator()<From, __half>()
                                   : false;
  };
  switch (from) {
    case DType::Float32:
      return to_float.template operator()<float>();
    case DType::BFloat16:
      return to_float.template operator()<__nv_bfloat16>();
    case DType::Float16:
      return to_float.template operator()<__half>();
    case DType::UInt8:
      return to_float.template operator()<uint8_t>();
    case DType::Bool:
      return to_float.template operator()<bool>();
    default:
      return false;
  }
}

}  // namespace

void convert_elements(TensorIterator& it) {
  if (it.numel() == 0) return;
  if (convert_rows(Launch(it.device()), it)) return;
  // Values pass as the source's compute type and are converted once, on store.
  visit_compute(it.dtype(1), [&]<class T>() { map_kernel<T, T, 1>(it, Identity{}); });
}

namespace {

void to_dtype(const Tensor& out, const Tensor& self, DType) {
  if (is_float8(out.dtype()) || is_float8(self.dtype())) return convert_float8(out, self);
  Tensor target = out;
  TensorIterator it;
  it.unary(target, self,
           {.promote = Promote::None,
            .output_dtype = self.dtype(),
            .op = "_to_dtype",
            .check_overlap = false,
            .check_output_cast = false});
  convert_elements(it);
}

const RegisterCuda registered([](KernelTable& t) { t._to_dtype = to_dtype; });

}  // namespace
}  // namespace vt::cuda
