// DLPack capsules. Lives with the bindings because capsules are Python objects.
#include "io/dlpack.h"

#include <memory>

#include "core/device_backend.h"
#include "core/storage_observer.h"
#include "python/python.h"

namespace vt::io {
namespace {

// The ABI's structs, as the DLPack specification lays them out.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};
constexpr uint64_t kReadOnly = 1, kCopied = 2;
// Device types of the specification: memory of the host, of CUDA, page-locked, and managed.
enum DeviceKind : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum Code : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kBool = 6,
  kFloat8_e4m3fn = 10,
  kFloat8_e5m2 = 12,
};

DLDataType to_dl(DType dtype) {
  const auto bits = static_cast<uint8_t>(item_size(dtype) * 8);
  if (dtype == DType::Bool) return {kBool, 8, 1};
  if (dtype == DType::UInt8) return {kUInt, 8, 1};
  if (dtype == DType::BFloat16) return {kBfloat, 16, 1};
  if (dtype == DType::Float8_e4m3fn) return {kFloat8_e4m3fn, 8, 1};
  if (dtype == DType::Float8_e5m2) return {kFloat8_e5m2, 8, 1};
  return {is_floating(dtype) ? kFloat : kInt, bits, 1};
}

DType from_dl(DLDataType t) {
  if (t.lanes == 1) {
    if (t.code == kBool && t.bits == 8) return DType::Bool;
    if (t.code == kUInt && t.bits == 8) return DType::UInt8;
    if (t.code == kBfloat && t.bits == 16) return DType::BFloat16;
    if (t.code == kFloat8_e4m3fn && t.bits == 8) return DType::Float8_e4m3fn;
    if (t.code == kFloat8_e5m2 && t.bits == 8) return DType::Float8_e5m2;
    if (t.code == kInt && t.bits == 8) return DType::Int8;
    if (t.code == kInt && t.bits == 16) return DType::Int16;
    if (t.code == kInt && t.bits == 32) return DType::Int32;
    if (t.code == kInt && t.bits == 64) return DType::Int64;
    if (t.code == kFloat && t.bits == 16) return DType::Float16;
    if (t.code == kFloat && t.bits == 32) return DType::Float32;
    if (t.code == kFloat && t.bits == 64) return DType::Float64;
  }
  fail(ErrorKind::Type, "from_dlpack: unsupported dtype (code ", int{t.code}, ", ", int{t.bits},
       " bits, ", int{t.lanes}, " lanes); convert it before the exchange");
}

/// Keeps the tensor, its shape and strides alive for the consumer.
template <class Managed>
struct Export {
  Managed managed;
  Tensor tensor;
  Dims shape, strides;
};

template <class Managed>
Managed* export_tensor(const Tensor& t) {
  auto* owner = new Export<Managed>{{}, t, Dims(t.sizes()), Dims(t.strides())};
  Managed& m = owner->managed;
  m.manager_ctx = owner;
  m.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->manager_ctx); };
  m.dl_tensor = {t.numel() ? t.data() : nullptr,
                 {t.device().is_cpu() ? kCpu : kCuda, t.device().is_cpu() ? 0 : t.device().index},
                 static_cast<int32_t>(t.dim()),
                 to_dl(t.dtype()),
                 owner->shape.data(),
                 owner->strides.data(),
                 0};
  return &m;
}

template <class Managed>
void drop_capsule(PyObject* capsule, const char* name) {
  // A consumed capsule was renamed: its memory is the consumer's to release.
  if (!PyCapsule_IsValid(capsule, name)) return;
  auto* m = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (m && m->deleter) m->deleter(m);
}

template <class Managed>
Tensor import_tensor(Managed* m, bool writable) {
  struct Drop {
    Managed* m;
    ~Drop() {
      if (m && m->deleter) m->deleter(m);
    }
  } drop{m};
  const DLTensor& t = m->dl_tensor;
  const bool cuda = t.device.device_type == kCuda || t.device.device_type == kCudaManaged;
  check(cuda || t.device.device_type == kCpu || t.device.device_type == kCudaHost,
        "from_dlpack: device type ", t.device.device_type,
        " is not supported here; move the data to the CPU first");
  const Device device =
      cuda ? resolve_device({DeviceType::CUDA, static_cast<int8_t>(t.device.device_id)}) : Device{};
  const DType dtype = from_dl(t.dtype);
  check_value(t.ndim >= 0 && t.ndim <= kMaxDims, "from_dlpack: ", t.ndim, " dimensions");
  const IntSpan sizes(t.shape, static_cast<size_t>(t.ndim));
  checked_numel(sizes);
  const Dims strides =
      t.strides ? Dims(IntSpan(t.strides, static_cast<size_t>(t.ndim))) : contiguous_strides(sizes);
  for (const int64_t s : strides) check(s >= 0, "from_dlpack: negative strides are not supported");
  auto* data = static_cast<char*>(t.data) + t.byte_offset;
  const auto nbytes = static_cast<size_t>(span_elements(sizes, strides) * item_size(dtype));
  auto release = [](void* context, void*, size_t) noexcept {
    auto* held = static_cast<Managed*>(context);
    if (held->deleter) held->deleter(held);
  };
  auto storage = make_ref<Storage>(Allocation{data, nbytes, m, release}, device);
  note_host_written(*storage, true);
  drop.m = nullptr;
  storage->set_writable(writable);
  auto impl = make_ref<TensorImpl>(std::move(storage), dtype, device);
  impl->set_geometry(sizes, strides, 0);
  return Tensor(std::move(impl));
}

}  // namespace

PyObject* to_dlpack_capsule(const Tensor& tensor, bool versioned, bool copied) {
  if (!versioned) {
    auto* m = export_tensor<DLManagedTensor>(tensor);
    return python::checked(PyCapsule_New(
        m, "dltensor", [](PyObject* c) { drop_capsule<DLManagedTensor>(c, "dltensor"); }));
  }
  auto* m = export_tensor<DLManagedTensorVersioned>(tensor);
  m->major = 1;
  m->minor = 0;
  m->flags = (tensor.storage()->writable() ? 0 : kReadOnly) | (copied ? kCopied : 0);
  return python::checked(PyCapsule_New(m, "dltensor_versioned", [](PyObject* c) {
    drop_capsule<DLManagedTensorVersioned>(c, "dltensor_versioned");
  }));
}

Tensor from_dlpack_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    auto* m =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    check(m->major == 1, "from_dlpack: DLPack version ", m->major, ".", m->minor,
          " is not supported (1.x is)");
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) throw python::PythonError();
    return import_tensor(m, (m->flags & kReadOnly) == 0);
  }
  check_value(PyCapsule_IsValid(capsule, "dltensor"),
              "from_dlpack: not a DLPack capsule, or one that was consumed already");
  auto* m = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  if (PyCapsule_SetName(capsule, "used_dltensor") < 0) throw python::PythonError();
  return import_tensor(m, true);
}

}  // namespace vt::io
