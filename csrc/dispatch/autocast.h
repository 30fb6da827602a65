// Mixed precision: which inputs of which ops are cast on the way in. Rows say `autocast: lower`
// (matmuls: the autocast dtype), `float32` (ops that need range) or `promote` (the widest input).
#pragma once

#include <initializer_list>
#include <vector>

#include "core/tensor.h"
#include "dispatch/thread_state.h"

namespace vt::autocast {

inline uint8_t bit(DeviceType type) {
  return type == DeviceType::CPU ? kAutocastCpu : kAutocastCuda;
}
bool enabled(DeviceType type);
void set_enabled(DeviceType type, bool enabled);
DType dtype(DeviceType type);
void set_dtype(DeviceType type, DType dtype);
/// Casts of leaf weights made in this context are kept until it ends.
bool cache_enabled();
void set_cache_enabled(bool enabled);
void clear_cache();

bool active_for(const Tensor& input);
bool active_for(TensorSpan inputs);
/// Switches autocast off for the op's own body.
class Off : Scoped<uint8_t> {
 public:
  Off()
      : Scoped(thread_state.front,
               static_cast<uint8_t>(thread_state.front & ~(kAutocastCpu | kAutocastCuda))) {}
};

Tensor lower_input(const Tensor& t);
std::vector<Tensor> lower_input(TensorSpan tensors);
Tensor raise_input(const Tensor& t);
std::vector<Tensor> raise_input(TensorSpan tensors);
DType widest(std::initializer_list<const Tensor*> tensors);
DType widest(std::initializer_list<const TensorSpan*> tensors);
Tensor promote_input(const Tensor& t, DType to);
std::vector<Tensor> promote_input(TensorSpan tensors, DType to);

}  // namespace vt::autocast
