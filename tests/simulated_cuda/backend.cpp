// A CUDA device without hardware: its memory is the host's, and its kernels are the CPU's. Loaded
// into a process before the real backend, it lets tests run whatever is independent of the
// hardware, such as captured steps, on tensors that are on "cuda".
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "core/device_backend.h"
#include "core/storage.h"
#include "dispatch/kernels.h"
#include "lowering.h"

namespace vt::simulated {
namespace {

constexpr size_t kAlignment = 512;

/// Memory that is filled with nonsense as it comes and as it goes.
Allocation allocate_bytes(size_t nbytes) {
  if (nbytes == 0) return {};
  const size_t rounded = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, rounded);
  if (!data) throw std::bad_alloc();
  std::memset(data, 0xD5, rounded);
  return {data, nbytes, nullptr, [](void*, void* bytes, size_t n) noexcept {
            std::memset(bytes, 0xDD, n);
            std::free(bytes);
          }};
}

class DeviceAllocator final : public Allocator {
 public:
  Allocation allocate(size_t nbytes, Device) override { return allocate_bytes(nbytes); }
};

class Backend final : public DeviceBackend {
 public:
  int count() const override { return 1; }
  std::string problem() const override { return {}; }
  int current() const override { return 0; }
  void synchronize(int) override {}
  void record_stream(const Storage&, int, uintptr_t) override {}
  uintptr_t current_stream(int) const override { return 0; }
  void order_streams(int, uintptr_t, bool) override {}
  Allocation allocate_pinned(size_t nbytes) override { return allocate_bytes(nbytes); }
  bool is_pinned(const void*) const override { return false; }
  int device_of(const void*) const override { return 0; }
};

/// The same bytes as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  auto impl = make_ref<TensorImpl>(t.storage(), t.dtype(), Device{});
  impl->set_geometry(t.sizes(), t.strides(), t.storage_offset());
  return Tensor(std::move(impl));
}

const Tensor& on_cpu_if(const Tensor& t, Tensor& moved) {
  return t.defined() && !t.device().is_cpu() ? moved = on_cpu(t) : t;
}
/// What stands for an argument of a CPU kernel.
template <class T>
struct Argument {
  T value;
  operator T() const { return value; }  // NOLINT: implicit on purpose
};
template <>
struct Argument<const Tensor&> {
  explicit Argument(const Tensor& t) : value(on_cpu_if(t, moved)) {}
  operator const Tensor&() const { return value; }  // NOLINT
  Tensor moved;
  const Tensor& value;
};

template <>
struct Argument<TensorSpan> {
  explicit Argument(TensorSpan list) {
    for (const Tensor& t : list) {
      Tensor place;
      moved.push_back(on_cpu_if(t, place));
    }
  }
  operator TensorSpan() const { return moved; }  // NOLINT
  std::vector<Tensor> moved;
};

/// A CPU kernel that takes whole tensors may mix them with new ones of the CPU: it gets them as
/// tensors of the CPU.
template <auto Member>
struct OnCpu;
template <class... Args, void (*KernelTable::*Member)(Args...)>
struct OnCpu<Member> {
  static inline void (*original)(Args...) = nullptr;
  static void call(Args... args) { original(Argument<Args>{args}...); }
  static void install(KernelTable& table) {
    original = table.*Member;
    table.*Member = call;
  }
};

const bool installed = [] {
  static Backend backend;
  static DeviceAllocator allocator;
  set_backend(DeviceType::CUDA, &backend);
  set_allocator(DeviceType::CUDA, &allocator);
  KernelTable& kernels = kernels_for(DeviceType::CUDA);
  kernels = kernels_for(DeviceType::CPU);
#define KERNEL(name) OnCpu<&KernelTable::name>::install(kernels);
#include "kernels.inc"
#undef KERNEL
  // The program's own functions are to see tensors of the device.
  kernels._foreign = kernels_for(DeviceType::CPU)._foreign;
  install_lowering();
  return true;
}();

}  // namespace
}  // namespace vt::simulated
