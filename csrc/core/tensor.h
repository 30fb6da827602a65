// Tensor: a handle on sizes and strides over a shared storage.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/scalar.h"
#include "core/small_vector.h"
#include "core/storage.h"

namespace vt {

/// The most dimensions a tensor may have (as in torch).
inline constexpr int kMaxDims = 64;

enum class MemoryFormat : uint8_t { Contiguous, ChannelsLast, Preserve };

namespace autograd {
struct AutogradMeta;
}

struct TensorImpl final : RefCounted {
  TensorImpl(Ref<Storage> storage, DType dtype, Device device);
  ~TensorImpl() override;
  void* operator new(size_t size);
  void operator delete(void* pointer) noexcept;

  Ref<Storage> storage;
  Dims sizes;
  Dims strides;        // in elements; may be zero (expanded), never negative
  int64_t offset = 0;  // in elements, from the start of the storage
  int64_t numel = 0;
  std::atomic<uint32_t>* version;   // the storage's, or own_version's
  Ref<VersionCounter> own_version;  // set where `.data` cut the tensor off from its base
  std::unique_ptr<autograd::AutogradMeta> autograd;  // null until a gradient is asked for
  void* python_object = nullptr;                     // weak: the Python wrapper, while one lives
  DType dtype;
  Device device;
  bool contiguous = true;       // row-major with no gaps; kept true by set_geometry
  bool wrapped_number = false;  // made from a Python number: weak in type promotion
  bool inference = false;       // made under inference_mode: autograd never sees it
  bool requires_grad = false;   // leaf flag; a non-leaf requires grad by its grad_fn

  /// Sets sizes and strides and derives numel and `contiguous`.
  void set_geometry(IntSpan new_sizes, IntSpan new_strides, int64_t new_offset);
  /// Row-major sizes; numel must be known not to overflow.
  void set_contiguous(IntSpan new_sizes, int64_t new_numel);

  static int64_t live_count();
};

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Ref<TensorImpl> impl) : impl_(std::move(impl)) {}

  bool defined() const { return static_cast<bool>(impl_); }
  TensorImpl* impl() const { return impl_.get(); }
  const Ref<TensorImpl>& ref() const { return impl_; }
  bool is_same(const Tensor& other) const { return impl_ == other.impl_; }
  void reset() { impl_.reset(); }

  IntSpan sizes() const { return impl_->sizes; }
  IntSpan strides() const { return impl_->strides; }
  int64_t dim() const { return static_cast<int64_t>(impl_->sizes.size()); }
  /// Extent of dimension `dim`, which may count from the end. Throws IndexError.
  int64_t size(int64_t dim) const;
  int64_t stride(int64_t dim) const;
  int64_t numel() const { return impl_->numel; }
  DType dtype() const { return impl_->dtype; }
  Device device() const { return impl_->device; }
  int64_t storage_offset() const { return impl_->offset; }
  int64_t itemsize() const { return item_size(impl_->dtype); }
  const Ref<Storage>& storage() const { return impl_->storage; }
  bool is_contiguous() const { return impl_->contiguous; }
  bool is_contiguous(MemoryFormat format) const;
  /// Every element has its own place and together they fill a block, in some order of dims.
  bool is_non_overlapping_and_dense() const;

  void* data() const {
    return static_cast<char*>(impl_->storage->data()) + impl_->offset * item_size(impl_->dtype);
  }
  template <class T>
  T* data_as() const {
    return static_cast<T*>(data());
  }

  uint32_t version() const { return impl_->version->load(std::memory_order_relaxed); }
  void bump_version() const { impl_->version->fetch_add(1, std::memory_order_relaxed); }

  /// The single element as a number. Throws unless numel() == 1; synchronises on a device.
  Scalar item() const;

 private:
  Ref<TensorImpl> impl_;
};

using TensorSpan = std::span<const Tensor>;
using TensorVec = SmallVector<Tensor, 4>;

/// Wraps `dim` in [-ndim, ndim) to [0, ndim); a 0-d tensor accepts -1 and 0. Throws IndexError.
int64_t wrap_dim(int64_t dim, int64_t ndim);
/// The same for what has such a dimension: IndexError where there are none.
int64_t checked_dim(int64_t dim, int64_t ndim);
/// Product with overflow and negative-size checks; the error names the shape.
int64_t checked_numel(IntSpan sizes);
Dims contiguous_strides(IntSpan sizes);
Dims channels_last_strides(IntSpan sizes);
/// Bytes from the first to one past the last element that this geometry can reach.
int64_t span_elements(IntSpan sizes, IntSpan strides);

Tensor empty(IntSpan sizes, DType dtype, Device device = {});
Tensor empty(IntSpan sizes, DType dtype, Device device, MemoryFormat format);
Tensor empty_strided(IntSpan sizes, IntSpan strides, DType dtype, Device device = {});
/// Uninitialised, with `like`'s sizes, dtype, device and (if dense) order of strides.
Tensor empty_like(const Tensor& like);
Tensor empty_like(const Tensor& like, DType dtype);
Tensor empty_like(const Tensor& like, DType dtype, Device device);
/// A 0-d CPU tensor that promotes like the Python number it came from.
Tensor wrapped_scalar(const Scalar& value);
/// Another geometry over the same storage. No autograd: the op front adds it.
Tensor make_view(const Tensor& base, IntSpan sizes, IntSpan strides, int64_t offset);
/// Same bytes and version counter, no history. The core of detach().
Tensor alias(const Tensor& base);

/// Reads one element from host memory.
Scalar load_scalar(const void* data, DType dtype);

/// Default floating dtype of new tensors (set_default_dtype).
DType default_dtype();
void set_default_dtype(DType dtype);

inline void append(std::string& out, const Tensor& tensor) {
  if (!tensor.defined()) {
    out += "None";
    return;
  }
  out += dtype_name(tensor.dtype());
  append(out, tensor.sizes());
}

}  // namespace vt
