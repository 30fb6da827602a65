#include "graphs/memory.h"

#include <algorithm>

#include "core/allocator.h"
#include "core/rebinding.h"
#include "dispatch/kernels.h"

namespace vt::graphs {

SharedBytes::SharedBytes(size_t nbytes, Device device)
    : allocation_(allocator_for(device.type).allocate(nbytes, device)) {}

SharedBytes::~SharedBytes() {
  if (allocation_.release)
    allocation_.release(allocation_.context, allocation_.data, allocation_.nbytes);
}

Allocation SharedBytes::share() {
  add_ref();
  const auto drop = [](void* context, void*, size_t) noexcept {
    static_cast<SharedBytes*>(context)->release();
  };
  return {allocation_.data, allocation_.nbytes, this, drop};
}

Loan::Loan(Ref<Storage> base, int64_t transfer)
    : base_(std::move(base)), nbytes_(base_->nbytes()), transfer_(transfer) {
  if (base_->device().is_cpu()) renew();
}

void Loan::renew() {
  bytes_ = make_ref<SharedBytes>(nbytes_, base_->device());
  base_->replace(bytes_->share());
}

void* Loan::place() {
  lent_ = allocate_storage(nbytes_, base_->device());
  return lent_->data();
}

Ref<Storage> Loan::copied() const {
  const auto bytes_of = [&](const Ref<Storage>& storage) {
    auto impl = make_ref<TensorImpl>(storage, DType::UInt8, storage->device());
    const Dims all{static_cast<int64_t>(nbytes_)}, dense{1};
    impl->set_geometry(all, dense, 0);
    return Tensor(std::move(impl));
  };
  Ref<Storage> copy = allocate_storage(nbytes_, base_->device());
  kernels_for(base_->device().type).copy_(bytes_of(copy), bytes_of(base_), true);
  return copy;
}

Tensor Loan::tensor(int64_t byte_offset, DType dtype, IntSpan sizes, IntSpan strides) {
  if (!lent_) lent_ = bytes_ ? make_ref<Storage>(bytes_->share(), base_->device()) : copied();
  auto impl = make_ref<TensorImpl>(lent_, dtype, lent_->device());
  impl->set_geometry(sizes, strides, byte_offset / item_size(dtype));
  return Tensor(std::move(impl));
}

void Loan::settle() {
  if (!lent_ || (bytes_ && lent_->use_count() == 1)) return;
  lent_.reset();
  if (!bytes_) return;
  renew();
}

void Guard::add(const Tensor& tensor) {
  const auto same = [&](const Bound& known) { return known.impl == tensor.ref(); };
  if (std::any_of(bound_.begin(), bound_.end(), same)) return;
  const TensorImpl& impl = *tensor.impl();
  Bound bound{tensor.ref(),
              impl.storage.get(),
              impl.storage->data(),
              impl.sizes,
              impl.strides,
              impl.offset,
              impl.requires_grad,
              {},
              {},
              {}};
  if (impl.autograd) {
    bound.hooks = impl.autograd->hooks;
    bound.post_hooks = impl.autograd->post_accumulate_hooks;
    bound.node_hooks = autograd::accumulator_hooks(*impl.autograd);
  }
  bound_.push_back(std::move(bound));
  seen_ = 0;
}

bool Guard::Bound::holds() const {
  const autograd::AutogradMeta* meta = impl->autograd.get();
  return impl->storage.get() == storage && storage->data() == data &&
         impl->requires_grad == requires_grad && impl->offset == offset && impl->sizes == sizes &&
         impl->strides == strides &&
         (meta ? meta->hooks == hooks && meta->post_accumulate_hooks == post_hooks &&
                     autograd::accumulator_hooks(*meta) == node_hooks
               : hooks.empty() && post_hooks.empty() && node_hooks.empty());
}

bool Guard::holds() {
  const uint64_t now = rebindings.load(std::memory_order_acquire);
  if (seen_ == now) return true;
  if (!std::all_of(bound_.begin(), bound_.end(), [](const Bound& b) { return b.holds(); }))
    return false;
  seen_ = now;
  return true;
}

}  // namespace vt::graphs
