// The description of a tensor that a backward formula needs when it does not need the values.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace vt::autograd {

class TensorMeta {
 public:
  TensorMeta() = default;
  explicit TensorMeta(const Tensor& t) : defined_(t.defined()) {
    if (!defined_) return;
    sizes_ = Dims(t.sizes());
    strides_ = Dims(t.strides());
    offset_ = t.storage_offset();
    numel_ = t.numel();
    dtype_ = t.dtype();
    device_ = t.device();
  }
  bool defined() const { return defined_; }
  IntSpan sizes() const { return sizes_; }
  IntSpan strides() const { return strides_; }
  int64_t size(int64_t dim) const { return sizes_[checked_dim(dim, this->dim())]; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t numel() const { return numel_; }
  int64_t storage_offset() const { return offset_; }
  int64_t itemsize() const { return item_size(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }

 private:
  Dims sizes_, strides_;
  int64_t offset_ = 0, numel_ = 0;
  DType dtype_ = DType::Float32;
  Device device_;
  bool defined_ = false;
};

inline std::vector<TensorMeta> metas_of(TensorSpan tensors) {
  std::vector<TensorMeta> metas;
  metas.reserve(tensors.size());
  for (const Tensor& t : tensors) metas.emplace_back(t);
  return metas;
}

}  // namespace vt::autograd
