#include "dispatch/autocast.h"

#include <unordered_map>

#include "autograd/front.h"
#include "vt/ops.h"

namespace vt::autocast {
namespace {

struct CachedCast {
  Tensor source;  // keeps the key alive
  Tensor cast;
};
thread_local std::unordered_map<TensorImpl*, CachedCast> cache;
thread_local bool use_cache = true;

bool eligible(const Tensor& t) {
  return t.defined() && is_floating(t.dtype()) && t.dtype() != DType::Float64;
}

Tensor cast(const Tensor& t, DType to) {
  if (!eligible(t) || t.dtype() == to) return t;
  const bool cacheable =
      use_cache && t.impl()->requires_grad && t.dtype() == DType::Float32 && is_reduced_float(to) &&
      !(t.impl()->autograd && t.impl()->autograd->grad_fn) && thread_state.grad_enabled;
  if (!cacheable) return ops::_to_dtype(t, to);
  if (const auto found = cache.find(t.impl());
      found != cache.end() && found->second.cast.dtype() == to) {
    return found->second.cast;
  }
  Tensor result = ops::_to_dtype(t, to);
  cache[t.impl()] = {t, result};
  return result;
}

template <class F>
std::vector<Tensor> each(TensorSpan tensors, F&& f) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(f(t));
  return out;
}

void widen(DType& dtype, const Tensor& t) {
  if (eligible(t) && !t.impl()->wrapped_number && t.dtype() == DType::Float32)
    dtype = DType::Float32;
}

}  // namespace

bool enabled(DeviceType type) { return (thread_state.front & bit(type)) != 0; }
void set_enabled(DeviceType type, bool on) {
  thread_state.front =
      static_cast<uint8_t>(on ? thread_state.front | bit(type) : thread_state.front & ~bit(type));
}
DType dtype(DeviceType type) {
  return static_cast<DType>(thread_state.autocast_dtype[static_cast<int>(type)]);
}
void set_dtype(DeviceType type, DType dtype) {
  thread_state.autocast_dtype[static_cast<int>(type)] = static_cast<uint8_t>(dtype);
}
bool cache_enabled() { return use_cache; }
void set_cache_enabled(bool enabled) { use_cache = enabled; }
void clear_cache() { cache.clear(); }

bool active_for(const Tensor& input) { return input.defined() && enabled(input.device().type); }
bool active_for(TensorSpan inputs) { return !inputs.empty() && active_for(inputs[0]); }

Tensor lower_input(const Tensor& t) { return t.defined() ? cast(t, dtype(t.device().type)) : t; }
std::vector<Tensor> lower_input(TensorSpan tensors) {
  return each(tensors, [](const Tensor& t) { return lower_input(t); });
}
Tensor raise_input(const Tensor& t) { return eligible(t) ? cast(t, DType::Float32) : t; }
std::vector<Tensor> raise_input(TensorSpan tensors) {
  return each(tensors, [](const Tensor& t) { return raise_input(t); });
}
DType widest(std::initializer_list<const Tensor*> tensors) {
  DType out = DType::Bool;
  for (const Tensor* t : tensors) {
    if (t->defined() && out == DType::Bool) out = dtype(t->device().type);
    widen(out, *t);
  }
  return out;
}
DType widest(std::initializer_list<const TensorSpan*> lists) {
  DType out = DType::Bool;
  for (const TensorSpan* list : lists) {
    for (const Tensor& t : *list) {
      if (t.defined() && out == DType::Bool) out = dtype(t.device().type);
      widen(out, t);
    }
  }
  return out;
}
Tensor promote_input(const Tensor& t, DType to) {
  return eligible(t) && !t.impl()->wrapped_number ? cast(t, to) : t;
}
std::vector<Tensor> promote_input(TensorSpan tensors, DType to) {
  return each(tensors, [to](const Tensor& t) { return promote_input(t, to); });
}

}  // namespace vt::autocast
