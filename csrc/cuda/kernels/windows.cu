// im2col and col2im. col2im gathers: every place of the result sums the windows that cover it, in
// the order of their elements.
#include "cuda/kernels/windows.cuh"

namespace vt::cuda {
namespace {
using namespace windows;

/// Moves elements of any dtype; all bits zero is 0 in each.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    unfold(Element* out, const Element* in, const __grid_constant__ Windows w, int64_t n) {
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t row = i / w.out_area(), o = i - row * w.out_area();
    const int64_t plane = row / w.taps(), tap = row - plane * w.taps();
    const int64_t iy = w.place(0, o / w.out[1], tap / w.kernel[1]);
    const int64_t ix = w.place(1, o % w.out[1], tap % w.kernel[1]);
    const bool inside = iy >= 0 && iy < w.in[0] && ix >= 0 && ix < w.in[1];
    out[i] = inside ? in[plane * w.in_area() + iy * w.in[1] + ix] : Element{};
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    fold(S* out, const S* in, const __grid_constant__ Windows w, int64_t n) {
  using T = Compute<S>;
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t plane = i / w.in_area(), place = i - plane * w.in_area();
    const int64_t y = place / w.in[1] + w.padding[0], x = place % w.in[1] + w.padding[1];
    T total = T(0);
    for (int64_t ky = 0; ky < w.kernel[0]; ++ky) {
      const int64_t top = y - ky * w.dilation[0], oy = top / w.stride[0];
      if (top < 0 || oy >= w.out[0] || oy * w.stride[0] != top) continue;
      for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
        const int64_t left = x - kx * w.dilation[1], ox = left / w.stride[1];
        if (left < 0 || ox >= w.out[1] || ox * w.stride[1] != left) continue;
        const int64_t tap = ky * w.kernel[1] + kx;
        total += convert<T>(
            in[(plane * w.taps() + tap) * w.out_area() + oy * w.out[1] + ox]);
      }
    }
    out[i] = convert<S>(total);
  }
}

/// Windows over an extent of `n`, as many as fit.
int64_t count(int64_t n, int64_t kernel, int64_t dilation, int64_t padding, int64_t stride) {
  return (n + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void im2col(const Tensor& out, const Tensor& self, IntSpan kernel, IntSpan dilation,
            IntSpan padding, IntSpan stride) {
  if (out.numel() == 0) return;
  int64_t extents[2];
  for (size_t i = 0; i < 2; ++i) {
    extents[i] = count(self.sizes()[self.sizes().size() - 2 + i], at(kernel, i), at(dilation, i),
                       at(padding, i), at(stride, i));
  }
  const Windows w(self.sizes(), extents, kernel, stride, padding, dilation);
  const Launch launch(self.device());
  const Tensor x = dense(self);
  visit_width(out.itemsize(), [&]<class Element>() {
    launch(unfold<Element>, element_grid(launch, out.numel()), dim3(kThreads), 0,
           static_cast<Element*>(out.data()), static_cast<const Element*>(x.data()), w,
           out.numel());
  });
}

void col2im(const Tensor& out, const Tensor& self, IntSpan output_size, IntSpan kernel,
            IntSpan dilation, IntSpan padding, IntSpan stride) {
  if (out.numel() == 0) return;
  int64_t extents[2];
  for (size_t i = 0; i < 2; ++i) {
    extents[i] = count(at(output_size, i), at(kernel, i), at(dilation, i), at(padding, i),
                       at(stride, i));
  }
  const Windows w(out.sizes(), extents, kernel, stride, padding, dilation);
  const Launch launch(self.device());
  const Tensor x = dense(self);
  visit_float_storage(self.dtype(), [&]<class S>() {
    launch(fold<S>, element_grid(launch, out.numel()), dim3(kThreads), 0, out.data_as<S>(),
           x.data_as<S>(), w, out.numel());
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.im2col = im2col;
  t.col2im = col2im;
});

}  // namespace
}  // namespace vt::cuda
