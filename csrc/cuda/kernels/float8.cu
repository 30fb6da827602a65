// Conversions from and to 8-bit floats. No other pointwise kernel knows these dtypes: here they are
// seen as bytes, and a functor converts.
#include "core/float8.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct ToFloat8 {
  bool e4m3;
  __device__ uint8_t operator()(float x) const {
    return e4m3 ? e4m3_of_float(x) : e5m2_of_float(x);
  }
};

struct FromFloat8 {
  bool e4m3;
  __device__ float operator()(uint8_t x) const {
    return e4m3 ? float_of_e4m3(x) : float_of_e5m2(x);
  }
};

/// From one of the two to the other.
struct Recode {
  bool to_e4m3;
  __device__ uint8_t operator()(uint8_t x) const {
    return to_e4m3 ? e4m3_of_float(float_of_e5m2(x)) : e5m2_of_float(float_of_e4m3(x));
  }
};

Tensor as_bytes(const Tensor& t) {
  auto impl = make_ref<TensorImpl>(t.storage(), DType::UInt8, t.device());
  impl->set_geometry(t.sizes(), t.strides(), t.storage_offset());
  return Tensor(std::move(impl));
}

}  // namespace

void convert_float8(const Tensor& to, const Tensor& from) {
  if (to.numel() == 0) return;
  if (to.dtype() == from.dtype()) return copy(to, from, true);
  const bool narrow_out = is_float8(to.dtype()), narrow_in = is_float8(from.dtype());
  Tensor target = narrow_out ? as_bytes(to) : to;
  const Tensor source = narrow_in ? as_bytes(from) : from;
  TensorIterator it;
  it.unary(target, source,
           {.promote = Promote::None,
            .output_dtype = source.dtype(),
            .op = "_to_dtype",
            .check_overlap = false,
            .check_output_cast = false});
  const bool to_e4m3 = to.dtype() == DType::Float8_e4m3fn;
  if (narrow_out && narrow_in) return map_kernel<uint8_t, uint8_t, 1>(it, Recode{to_e4m3});
  if (narrow_out) return map_kernel<float, uint8_t, 1>(it, ToFloat8{to_e4m3});

  const FromFloat8 widen{from.dtype() == DType::Float8_e4m3fn};
  const Launch launch(to.device());
  const auto rows = [&]<class To>() {
    return detail::run_rows<uint8_t, uint8_t, To, uint8_t, float, 1>(launch, it, DType::UInt8,
                                                                     widen);
  };
  if (to.dtype() == DType::BFloat16 && rows.operator()<__nv_bfloat16>()) return;
  if (to.dtype() == DType::Float16 && rows.operator()<__half>()) return;
  map_kernel<uint8_t, float, 1>(it, widen);
}

}  // namespace vt::cuda
