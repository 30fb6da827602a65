// Registers the CUDA backend as the library loads. Loading needs no driver: calls that do say so.
#include "core/device_backend.h"
#include "core/storage.h"
#include "cuda/allocator.h"
#include "cuda/device.h"

namespace vt::cuda {
namespace {

class Backend final : public DeviceBackend {
 public:
  int count() const override { return device_count(); }
  std::string problem() const override { return device_problem(); }
  int current() const override { return current_device(); }
  void synchronize(int device) override { synchronize_device(device); }
  Allocation allocate_pinned(size_t nbytes) override { return pinned_allocator().allocate(nbytes); }
  void record_stream(const Storage& storage, uintptr_t stream) override {
    cuda::record_stream(storage, reinterpret_cast<cudaStream_t>(stream));
  }
  bool is_pinned(const void* pointer) const override { return cuda::is_pinned(pointer); }
};

const bool registered = [] {
  static Backend* backend = new Backend;  // outlives static objects that hold tensors
  set_backend(DeviceType::CUDA, backend);
  install_allocator();
  return true;
}();

}  // namespace
}  // namespace vt::cuda
