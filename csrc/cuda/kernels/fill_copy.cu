// Fills and copies: within a device, between devices, and between host and device; joins.
#include <cmath>
#include <optional>

#include "core/float8.h"
#include "core/host_wait.h"
#include "core/overlap.h"
#include "core/view_geometry.h"
#include "cuda/allocator.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/transpose.cuh"
#include "cuda/preload.h"
#include "cuda/sync.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

template <class T>
struct Constant {
  T value;
  __device__ T operator()() const { return value; }
};

void fill(const Tensor& self, const Tensor& value) {
  check(value.dim() == 0, "fill_ only supports 0-dimension value tensor but got tensor with ",
        value.dim(), " dimensions.");
  if (self.numel() == 0) return;
  if (value.device().is_cuda()) {
    Dims zeros(self.sizes().size(), int64_t{0});
    copy(self, make_view(value, self.sizes(), zeros, value.storage_offset()), true);
    return;
  }
  const Scalar number = load_scalar(value.data(), value.dtype());
  Tensor target = self;
  if (self.is_non_overlapping_and_dense()) {
    const double v = number.to_double();
    const bool zero = v == 0 && !std::signbit(v);
    if (zero || self.itemsize() == 1) {
      const int byte = zero                          ? 0
                       : is_float8(self.dtype())     ? float8_bits(static_cast<float>(v), self.dtype())
                       : self.dtype() == DType::Bool ? number.to_bool()
                                                     : static_cast<uint8_t>(number.to_int());
      const Launch launch(self.device());
      check_cuda(
          cudaMemsetAsync(self.data(), byte, static_cast<size_t>(self.numel() * self.itemsize()),
                          launch.stream()),
          "filling a tensor");
      return;
    }
    // Any order of the elements is the same fill.
    target = make_view(self, Dims{self.numel()}, Dims{1}, self.storage_offset());
  }
  if (is_float8(self.dtype())) {  // one converted element, repeated
    const Tensor element = empty({}, self.dtype(), self.device());
    fill(element, value);
    return fill(self, element);
  }
  TensorIterator it;
  Tensor* outs[] = {&target};
  it.build(outs, {}, {.promote = Promote::None, .output_dtype = self.dtype(), .op = "fill_"});
  visit_compute(self.dtype(), [&]<class T>() {
    T v = number.to<T>();
    map_kernel<T, T, 0>(it, Constant<T>{v});
  });
}

void copy_on_device(const Tensor& self, const Tensor& src) {
  const Launch launch(self.device());
  if (self.dtype() == src.dtype() && self.is_contiguous() && src.is_contiguous()) {
    auto* to = static_cast<char*>(self.data());
    const auto* from = static_cast<const char*>(src.data());
    const auto bytes = static_cast<size_t>(self.numel() * self.itemsize());
    if (to == from) return;
    const auto copy_to = [&](void* target, const void* source) {
      check_cuda(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, launch.stream()),
                 "copying on the device");
    };
    if (to < from + bytes && from < to + bytes) {
      const Scratch between(bytes, launch);
      copy_to(between.data(), from);
      copy_to(to, between.data());
    } else {
      copy_to(to, from);
    }
    return;
  }
  if (self.dtype() != src.dtype() && (is_float8(self.dtype()) || is_float8(src.dtype())))
    return convert_float8(self, src);
  Tensor target = self;
  TensorIterator it;
  it.unary(target, src,
           {.promote = Promote::None,
            .output_dtype = src.dtype(),
            .op = "copy_",
            .check_output_cast = false});
  if (self.dtype() == src.dtype())
    move_elements(launch, it);
  else if (!convert_transposed(launch, it))
    convert_elements(it);
}

/// The two ends are dense and have the same sizes, dtype and order of elements; one is in host memory.
void copy_bytes(const Tensor& self, const Tensor& src, bool non_blocking) {
  const bool to_host = self.device().is_cpu();
  check(!capturing(), "a copy between host and device of ", self.sizes(), " ", self.dtype(),
        " would be repeated with the addresses of now, so it cannot be part of a captured step");
  const Launch launch(to_host ? src.device() : self.device());
  const auto bytes = static_cast<size_t>(self.numel() * self.itemsize());
  const Tensor& host = to_host ? self : src;
  const bool waits = !non_blocking || !is_pinned(host.data());
  // Pageable memory is staged by the driver before the call returns when it is the source; as the
  // target it would be written later, so the call waits. The driver's own call may wait as well.
  const char* what = to_host        ? "copying to the host"
                     : non_blocking ? "copying from pageable memory"
                                    : "copying from the host";
  if (waits) announce_wait(what);
  std::optional<HostWait> waiting;
  if (waits) waiting.emplace();
  check_cuda(
      cudaMemcpyAsync(self.data(), src.data(), bytes,
                      to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, launch.stream()),
      to_host ? "copying to the host" : "copying to the device");
  if (waits)
    wait_for_announced(launch.stream(), what);
  else
    record_stream(*host.storage(), {launch.stream(), launch.device()});
}

void copy_between_devices(const Tensor& self, const Tensor& src) {
  check(!capturing(), "a captured step runs on one device: it cannot copy from ", src.device(),
        " to ", self.device());
  // The copy runs on the source's stream, after the target's earlier work and before its later.
  enable_peer_access(self.device().index, src.device().index);
  const Stream from = current_stream(src.device().index), to = current_stream(self.device().index);
  Event ready, done;
  ready.record(to);
  ready.wait(from);
  {
    const DeviceGuard guard(from.device);
    check_cuda(
        cudaMemcpyPeerAsync(self.data(), self.device().index, src.data(), from.device,
                            static_cast<size_t>(self.numel() * self.itemsize()), from.handle),
        "copying between devices");
  }
  done.record(from);
  done.wait(to);
}

}  // namespace

void copy(const Tensor& self, const Tensor& source, bool non_blocking) {
  const Overlap overlap = memory_overlap(self, source);
  if (overlap == Overlap::Full) return;  // also where elements share a place
  if (overlap == Overlap::Partial) check_no_partial_overlap(self, source);
  const Tensor src =
      equal(self.sizes(), source.sizes()) ? source : broadcast_to(source, self.sizes());
  if (self.numel() == 0) return;
  if (self.device() == src.device()) {
    copy_on_device(self, src);
    return;
  }
  // The bytes that cross are dense and already of the target's dtype where that makes them fewer.
  const bool narrow_first = item_size(self.dtype()) < item_size(src.dtype());
  const DType crossing = narrow_first || self.dtype() == src.dtype() ? self.dtype() : src.dtype();
  // Where both have the same strides the order of the elements does not matter.
  const bool alike = self.dtype() == src.dtype() && equal(self.strides(), src.strides()) &&
                     self.is_non_overlapping_and_dense();
  Tensor from = src, to = self;
  if (src.dtype() != crossing || !(alike || src.is_contiguous())) {
    from = empty(self.sizes(), crossing, src.device());
    kernels_for(src.device().type).copy_(from, src, false);
  }
  if (self.dtype() != crossing || !(alike || self.is_contiguous()))
    to = empty(self.sizes(), crossing, self.device());
  if (self.device().is_cuda() && src.device().is_cuda())
    copy_between_devices(to, from);
  else
    // A temporary must not be freed or read while the copy runs.
    copy_bytes(to, from, non_blocking && to.is_same(self) && from.is_same(src));
  if (!to.is_same(self)) kernels_for(self.device().type).copy_(self, to, false);
}

namespace {

void cat(const Tensor& out, TensorSpan tensors, int64_t dim) {
  int64_t start = 0;
  for (const Tensor& t : tensors) {
    if (t.dim() == 1 && t.numel() == 0) continue;
    const int64_t d = wrap_dim(dim, out.dim());
    Dims sizes(out.sizes());
    sizes[d] = t.sizes()[d];
    const Tensor part =
        make_view(out, sizes, out.strides(), out.storage_offset() + start * out.strides()[d]);
    copy(part, t, true);
    start += t.sizes()[d];
  }
}

const RegisterCuda registered([](KernelTable& t) {
  t.fill_ = fill;
  t.copy_ = copy;
  t.clone = [](const Tensor& out, const Tensor& self, std::optional<MemoryFormat>) {
    copy(out, self, true);
  };
  t.cat = cat;
});
}  // namespace
}  // namespace vt::cuda
