// _to_dtype: a converted copy with the same layout.
#include "core/parallel.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/rows.h"

namespace vt::cpu::VT_ISA {
namespace {

/// Between float and a narrower float, straight from memory to memory; false for other pairs.
bool convert_dense(const Tensor& out, const Tensor& self) {
  if (!self.is_contiguous() || !out.is_contiguous()) return false;
  const auto convert = [&]<class To, class From>(void (*array)(To*, const From*, int64_t)) {
    auto* to = static_cast<To*>(out.data());
    const auto* from = static_cast<const From*>(self.data());
    parallel_for(0, self.numel(), 65536,
                 [&](int64_t b, int64_t e) { array(to + b, from + b, e - b); });
    return true;
  };
  const auto convert8 = [&](DType narrow, auto array, auto* to, const auto* from) {
    parallel_for(0, self.numel(), 65536,
                 [&](int64_t b, int64_t e) { array(to + b, from + b, e - b, narrow); });
    return true;
  };
  if (self.dtype() == DType::Float32) {
    if (is_float8(out.dtype()))
      return convert8(out.dtype(), float8_from_f32, static_cast<uint8_t*>(out.data()),
                      static_cast<const float*>(self.data()));
    if (out.dtype() == DType::BFloat16) return convert(bf16_from_f32);
    if (out.dtype() == DType::Float16) return convert(f16_from_f32);
  } else if (out.dtype() == DType::Float32) {
    if (is_float8(self.dtype()))
      return convert8(self.dtype(), f32_from_float8, static_cast<float*>(out.data()),
                      static_cast<const uint8_t*>(self.data()));
    if (self.dtype() == DType::BFloat16) return convert(f32_from_bf16);
    if (self.dtype() == DType::Float16) return convert(f32_from_f16);
  }
  return false;
}

void to_dtype(const Tensor& out, const Tensor& self, DType) {
  if (convert_dense(out, self)) return;
  Tensor target = out;
  TensorIterator it;
  it.unary(target, self,
           {.promote = Promote::None,
            .output_dtype = self.dtype(),
            .op = "_to_dtype",
            .check_overlap = false,
            .check_output_cast = false});
  convert_rows(it);
}

const RegisterCpu registered([](KernelTable& t) { t._to_dtype = to_dtype; });

}  // namespace

/// Values pass as the source's compute type and are converted once, on store.
void convert_rows(const TensorIterator& it) {
  visit_all(it.dtype(1), [&]<class T>() { map_kernel(it, [](T x) -> T { return x; }); });
}

}  // namespace vt::cpu::VT_ISA
