// Changing what a tensor is over: resize_ and set_. They act on the handle, not on values, so
// nothing is recorded; autograd refuses tensors that require grad.
#include <cstring>

#include "autograd/front.h"
#include "autograd/gradient_observer.h"
#include "core/rebinding.h"
#include "core/storage_observer.h"
#include "dispatch/consumer.h"
#include "vt/meta_decls.h"
#include "vt/ops.h"

namespace vt::composite {

Tensor resize_(const Tensor& self, IntSpan size, std::optional<MemoryFormat> memory_format) {
  check(!autograd::requires_grad(self) || !thread_state.grad_enabled,
        "cannot resize variables that require grad");
  const int64_t numel = checked_numel(size);
  const Dims strides = memory_format == MemoryFormat::ChannelsLast ? channels_last_strides(size)
                                                                   : contiguous_strides(size);
  if (vt::equal(self.sizes(), size) && !memory_format) return self;
  const int64_t bytes = (self.storage_offset() + numel) * self.itemsize();
  Storage& storage = *self.storage();
  if (bytes > static_cast<int64_t>(storage.nbytes())) {
    check(storage.writable(), "Trying to resize storage that is not resizable");
    note_bytes_wanted(storage);
    // What the storage held stays, in place; on a device the copies are in the stream's order.
    const bool host = self.device().is_cpu();
    const int64_t held = host ? 0 : static_cast<int64_t>(storage.nbytes()) / self.itemsize();
    const NoGrad no_grad;
    Tensor kept;
    if (held > 0)
      kept = ops::clone(make_view(ops::detach(self), Dims{held}, Dims{1}, 0), std::nullopt);
    const Allocation grown =
        allocator_for(self.device().type).allocate(static_cast<size_t>(bytes), self.device());
    if (host && storage.nbytes() > 0) std::memcpy(grown.data, storage.data(), storage.nbytes());
    storage.replace(grown);
    if (held > 0) ops::copy_(make_view(ops::detach(self), Dims{held}, Dims{1}, 0), kept, false);
  }
  autograd::note_tensor_changes(self);
  self.impl()->set_geometry(size, strides, self.storage_offset());
  note_rebinding();
  return self;
}

Tensor resize_as_(const Tensor& self, const Tensor& the_template,
                  std::optional<MemoryFormat> memory_format) {
  return ops::resize_(self, the_template.sizes(), memory_format);
}

Tensor set_(const Tensor& self, const Tensor& source) {
  check(self.dtype() == source.dtype(), "set_: expected a source of dtype ", self.dtype(), ", got ",
        source.dtype());
  check(!autograd::requires_grad(self),
        "set_: cannot be used on a tensor that requires grad; use .data");
  autograd::note_tensor_changes(self);
  TensorImpl* to = self.impl();
  if (!to->own_version) {
    to->own_version = make_ref<VersionCounter>();
    to->own_version->value.store(to->version->load());
    to->version = &to->own_version->value;
  }
  to->storage = source.storage();
  to->device = source.device();
  to->set_geometry(source.sizes(), source.strides(), source.storage_offset());
  self.bump_version();
  note_rebinding();
  return self;
}

}  // namespace vt::composite

namespace vt {

Scalar Tensor::item() const {
  check(numel() == 1, "a Tensor with ", numel(), " elements cannot be converted to Scalar");
  if (!impl()->wrapped_number) host_read(*this, "item()");
  if (device().is_cpu()) return load_scalar(data(), dtype());
  const NoGrad no_grad;
  const Tensor host = vt::empty({}, dtype());
  ops::copy_(host, ops::reshape(*this, {}), false);
  return load_scalar(host.data(), dtype());
}

}  // namespace vt
