#include "core/tensor.h"

#include <cstring>

#include "autograd/meta.h"
#include "core/block_cache.h"
#include "core/device_backend.h"
#include "core/float8.h"

namespace vt {
namespace {

std::atomic<int64_t> live_tensors{0};
std::atomic<DType> default_float{DType::Float32};

}  // namespace

void* TensorImpl::operator new(size_t size) {
  live_tensors.fetch_add(1, std::memory_order_relaxed);
  return block_cache_allocate(size);
}
void TensorImpl::operator delete(void* pointer) noexcept {
  live_tensors.fetch_sub(1, std::memory_order_relaxed);
  block_cache_release(pointer, sizeof(TensorImpl));
}
TensorImpl::TensorImpl(Ref<Storage> storage, DType dtype, Device device)
    : storage(std::move(storage)),
      version(&this->storage->version()),
      dtype(dtype),
      device(device) {}
TensorImpl::~TensorImpl() = default;
int64_t TensorImpl::live_count() { return live_tensors.load(std::memory_order_relaxed); }

void TensorImpl::set_geometry(IntSpan new_sizes, IntSpan new_strides, int64_t new_offset) {
  sizes.assign(new_sizes);
  strides.assign(new_strides);
  offset = new_offset;
  int64_t count = 1;
  bool dense = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1) dense &= strides[i] == count;
    count *= sizes[i];
  }
  numel = count;
  contiguous = dense || count == 0;
}

void TensorImpl::set_contiguous(IntSpan new_sizes, int64_t new_numel) {
  sizes.assign(new_sizes);
  strides.resize(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  numel = new_numel;
  contiguous = true;
}

int64_t Tensor::size(int64_t d) const { return impl_->sizes[checked_dim(d, dim())]; }
int64_t Tensor::stride(int64_t d) const { return impl_->strides[checked_dim(d, dim())]; }

bool Tensor::is_contiguous(MemoryFormat format) const {
  if (format != MemoryFormat::ChannelsLast) return impl_->contiguous;
  if (dim() != 4) return false;
  constexpr int order[4] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int d : order) {
    if (impl_->sizes[d] != 1 && impl_->strides[d] != expected) return false;
    expected *= impl_->sizes[d];
  }
  return true;
}

bool Tensor::is_non_overlapping_and_dense() const {
  if (impl_->contiguous) return true;
  SmallVector<std::pair<int64_t, int64_t>, 6> dims;
  for (int64_t i = 0; i < dim(); ++i) {
    if (impl_->sizes[i] != 1) dims.push_back({impl_->strides[i], impl_->sizes[i]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

int64_t wrap_dim(int64_t dim, int64_t ndim) {
  const int64_t range = std::max<int64_t>(ndim, 1);
  if (dim < -range || dim >= range) [[unlikely]] {
    fail(ErrorKind::Index, "Dimension out of range (expected to be in range of [", -range, ", ",
         range - 1, "], but got ", dim, ")");
  }
  return dim < 0 ? dim + range : dim;
}

int64_t checked_dim(int64_t dim, int64_t ndim) {
  if (ndim == 0) [[unlikely]]
    fail(ErrorKind::Index, "Dimension specified as ", dim, " but tensor has no dimensions");
  return wrap_dim(dim, ndim);
}

int64_t checked_numel(IntSpan sizes) {
  int64_t count = 1;
  bool overflow = false;
  bool empty = false;
  for (const int64_t size : sizes) {
    check(size >= 0, "Trying to create tensor with negative dimension ", size, ": ", sizes);
    empty |= size == 0;
    overflow |= __builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count);
  }
  check(!overflow || empty, "Storage size calculation overflowed with sizes=", sizes);
  return empty ? 0 : count;
}

Dims contiguous_strides(IntSpan sizes) {
  Dims strides;
  strides.resize(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

Dims channels_last_strides(IntSpan sizes) {
  check(sizes.size() == 4, "required rank 4 tensor to use channels_last format, got shape ", sizes);
  const int64_t c = std::max<int64_t>(sizes[1], 1), h = std::max<int64_t>(sizes[2], 1),
                w = std::max<int64_t>(sizes[3], 1);
  return {h * w * c, 1, w * c, c};
}

int64_t span_elements(IntSpan sizes, IntSpan strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    int64_t step = 0;
    const bool overflow = __builtin_mul_overflow(sizes[i] - 1, strides[i], &step) ||
                          __builtin_add_overflow(last, step, &last);
    check(!overflow, "Storage size calculation overflowed with sizes=", sizes,
          " and strides=", strides);
  }
  return last + 1;
}

namespace {

size_t byte_count(int64_t elements, DType dtype, IntSpan sizes) {
  int64_t bytes = 0;
  check(!__builtin_mul_overflow(elements, item_size(dtype), &bytes),
        "Storage size calculation overflowed with sizes=", sizes);
  return static_cast<size_t>(bytes);
}

void check_rank(IntSpan sizes) {
  check(sizes.size() <= kMaxDims, "a tensor has at most ", kMaxDims, " dimensions, got ",
        sizes.size());
}

}  // namespace

Tensor empty(IntSpan sizes, DType dtype, Device device) {
  check_rank(sizes);
  const int64_t numel = checked_numel(sizes);
  if (device.index < 0) device = resolve_device(device);
  auto impl = make_ref<TensorImpl>(allocate_storage(byte_count(numel, dtype, sizes), device), dtype,
                                   device);
  impl->set_contiguous(sizes, numel);
  return Tensor(std::move(impl));
}

Tensor empty(IntSpan sizes, DType dtype, Device device, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) {
    checked_numel(sizes);
    return empty_strided(sizes, channels_last_strides(sizes), dtype, device);
  }
  return empty(sizes, dtype, device);
}

Tensor empty_strided(IntSpan sizes, IntSpan strides, DType dtype, Device device) {
  check_rank(sizes);
  check(sizes.size() == strides.size(), "mismatch in length of strides and shape: ", sizes, " and ",
        strides);
  checked_numel(sizes);
  for (const int64_t stride : strides) {
    check(stride >= 0,
          "as_strided: Negative strides are not supported at the moment, got strides: ", strides);
  }
  const int64_t elements = span_elements(sizes, strides);
  if (device.index < 0) device = resolve_device(device);
  auto impl = make_ref<TensorImpl>(allocate_storage(byte_count(elements, dtype, sizes), device),
                                   dtype, device);
  impl->set_geometry(sizes, strides, 0);
  return Tensor(std::move(impl));
}

Tensor empty_like(const Tensor& like) { return empty_like(like, like.dtype()); }

Tensor empty_like(const Tensor& like, DType dtype) {
  return empty_like(like, dtype, like.device());
}

Tensor empty_like(const Tensor& like, DType dtype, Device device) {
  if (like.is_contiguous()) return empty(like.sizes(), dtype, device);
  if (like.is_non_overlapping_and_dense()) {
    return empty_strided(like.sizes(), like.strides(), dtype, device);
  }
  // Not dense: keep the order of the strides, drop the gaps.
  SmallVector<int64_t, 8> order;
  for (int64_t i = 0; i < like.dim(); ++i) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const int64_t sa = like.strides()[a], sb = like.strides()[b];
    if (sa == 0 || sb == 0) return a < b;
    return sa > sb;
  });
  Dims strides;
  strides.resize(order.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(like.sizes()[order[i]], 1);
  }
  return empty_strided(like.sizes(), strides, dtype, device);
}

Tensor make_view(const Tensor& base, IntSpan sizes, IntSpan strides, int64_t offset) {
  TensorImpl* from = base.impl();
  auto impl = make_ref<TensorImpl>(from->storage, from->dtype, from->device);
  impl->set_geometry(sizes, strides, offset);
  impl->version = from->version;
  impl->own_version = from->own_version;
  impl->inference = from->inference;
  return Tensor(std::move(impl));
}

Tensor alias(const Tensor& base) {
  return make_view(base, base.sizes(), base.strides(), base.storage_offset());
}

Tensor wrapped_scalar(const Scalar& value) {
  // Numbers travel as float64/int64/bool so that no precision is lost before the op rounds once.
  const DType dtype = value.dtype(DType::Float64);
  Tensor result = empty({}, dtype);
  if (value.is_bool())
    *result.data_as<bool>() = value.to_bool();
  else if (value.is_int())
    *result.data_as<int64_t>() = value.to_int();
  else
    *result.data_as<double>() = value.to_double();
  result.impl()->wrapped_number = true;
  return result;
}

DType default_dtype() { return default_float.load(std::memory_order_relaxed); }

void set_default_dtype(DType dtype) {
  check_type(
      is_floating(dtype) && !is_float8(dtype),
      "only floating-point types of 16 bits and more are supported as the default type, got ",
      dtype);
  default_float.store(dtype, std::memory_order_relaxed);
}

Scalar load_scalar(const void* data, DType dtype) {
  switch (dtype) {
    case DType::Bool:
      return *static_cast<const bool*>(data);
    case DType::UInt8:
      return int64_t{*static_cast<const uint8_t*>(data)};
    case DType::Int8:
      return int64_t{*static_cast<const int8_t*>(data)};
    case DType::Int16:
      return int64_t{*static_cast<const int16_t*>(data)};
    case DType::Int32:
      return int64_t{*static_cast<const int32_t*>(data)};
    case DType::Int64:
      return *static_cast<const int64_t*>(data);
    case DType::Float16:
      return to_float(*static_cast<const Half*>(data));
    case DType::BFloat16:
      return to_float(*static_cast<const BFloat16*>(data));
    case DType::Float32:
      return *static_cast<const float*>(data);
    case DType::Float64:
      return *static_cast<const double*>(data);
    case DType::Float8_e4m3fn:
      return to_float(*static_cast<const Float8_e4m3fn*>(data));
    case DType::Float8_e5m2:
      return to_float(*static_cast<const Float8_e5m2*>(data));
  }
  __builtin_unreachable();
}

}  // namespace vt
