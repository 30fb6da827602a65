// Registers the CUDA backend as the library loads. Loading needs no driver: calls that do say so.
#include "core/device_backend.h"
#include "core/storage.h"
#include "cuda/allocator.h"
#include "cuda/cudnn_convolution.h"
#include "cuda/device.h"
#include "cuda/graph.h"
#include "cuda/preload.h"
#include "cuda/stream.h"

namespace vt::cuda {
namespace {

class Backend final : public DeviceBackend {
 public:
  int count() const override { return device_count(); }
  std::string problem() const override { return device_problem(); }
  int current() const override { return current_device(); }
  void synchronize(int device) override { synchronize_device(device); }
  Allocation allocate_pinned(size_t nbytes) override { return pinned_allocator().allocate(nbytes); }
  void record_stream(const Storage& storage, int device, uintptr_t stream) override {
    cuda::record_stream(storage, {reinterpret_cast<cudaStream_t>(stream), device});
  }
  uintptr_t current_stream(int device) const override {
    return reinterpret_cast<uintptr_t>(cuda::current_stream(device).handle);
  }
  void order_streams(int device, uintptr_t stream, bool after) override {
    const Stream other{reinterpret_cast<cudaStream_t>(stream), device};
    const Stream current = cuda::current_stream(device);
    if (other == current) return;
    Event event;
    event.record(after ? other : current);
    event.wait(after ? current : other);
  }
  bool is_pinned(const void* pointer) const override { return cuda::is_pinned(pointer); }
  int device_of(const void* pointer) const override { return cuda::device_of(pointer); }
  bool has_convolution(ConvolutionProduct product, const Convolution& shape) override {
    return cudnn::has_convolution(product, shape);
  }
  void before_fork() override { wait_for_preloads(); }
  void finish() override { finish_preloads(); }
};

const bool registered = [] {
  static Backend* backend = new Backend;  // outlives static objects that hold tensors
  set_backend(DeviceType::CUDA, backend);
  install_allocator();
  set_before_start(&preload);
  install_lowering();
  return true;
}();

}  // namespace
}  // namespace vt::cuda
