#include "graphs/memory.h"

#include <algorithm>

#include "core/allocator.h"
#include "dispatch/kernels.h"

namespace vt::graphs {
namespace {

/// A storage over another's bytes, which it keeps alive.
Ref<Storage> borrow(const Ref<Storage>& base) {
  base->add_ref();
  const auto release = [](void* context, void*, size_t) noexcept {
    static_cast<Storage*>(context)->release();
  };
  return make_ref<Storage>(Allocation{base->data(), base->nbytes(), base.get(), release},
                           base->device());
}

Tensor bytes_of(const Ref<Storage>& storage) {
  auto impl = make_ref<TensorImpl>(storage, DType::UInt8, storage->device());
  const int64_t n = static_cast<int64_t>(storage->nbytes());
  impl->set_contiguous(IntSpan(&n, 1), n);
  return Tensor(std::move(impl));
}

}  // namespace

Tensor Loan::tensor(int64_t byte_offset, DType dtype, IntSpan sizes, IntSpan strides) {
  if (!lent_) lent_ = borrow(base_);
  auto impl = make_ref<TensorImpl>(lent_, dtype, lent_->device());
  impl->set_geometry(sizes, strides, byte_offset / item_size(dtype));
  return Tensor(std::move(impl));
}

void Loan::settle() {
  if (!lent_ || lent_->use_count() == 1) return;
  const Device device = base_->device();
  lent_->replace(allocator_for(device.type).allocate(base_->nbytes(), device));
  kernels_for(device.type).copy_(bytes_of(lent_), bytes_of(base_), false);
  lent_.reset();
}

void Guard::add(const Tensor& tensor) {
  const auto same = [&](const Bound& known) { return known.impl == tensor.ref(); };
  if (std::any_of(bound_.begin(), bound_.end(), same)) return;
  bound_.push_back({tensor.ref(), tensor.storage().get(), tensor.storage()->data(),
                    tensor.impl()->requires_grad});
}

bool Guard::holds() const {
  return std::all_of(bound_.begin(), bound_.end(), [](const Bound& b) {
    return b.impl->storage.get() == b.storage && b.storage->data() == b.data &&
           b.impl->requires_grad == b.requires_grad;
  });
}

}  // namespace vt::graphs
