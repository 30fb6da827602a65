// im2col and col2im. col2im gathers: every place of the result sums the windows that cover it, in
// the order of their elements.
#include "cuda/kernels/windows.cuh"

#include "cuda/kernels/offsets.cuh"

namespace vt::cuda {
namespace {
using namespace windows;

/// Division of any number.
struct WideDivisor {
  int64_t divisor;
  explicit WideDivisor(int64_t d) : divisor(d) {}
  __device__ int64_t divide(int64_t n) const { return n / divisor; }
};

/// What takes an element's number apart: by multiplications where there are few enough elements.
template <class Divisor, class Index>
struct Places {
  Divisor area, taps, out_width, kernel_width;

  explicit Places(const Windows& w)
      : area(static_cast<Index>(w.out_area())),
        taps(static_cast<Index>(w.taps())),
        out_width(static_cast<Index>(w.out[1])),
        kernel_width(static_cast<Index>(w.kernel[1])) {}
  /// The quotient; `n` becomes the rest.
  __device__ static Index split(const Divisor& by, Index& n) {
    const Index quotient = by.divide(n);
    n -= quotient * by.divisor;
    return quotient;
  }
};

/// Moves elements of any dtype; all bits zero is 0 in each.
template <class Element, class Divisor, class Index>
__global__ void __launch_bounds__(kThreads)
    unfold(Element* out, const Element* in, const __grid_constant__ Windows w,
           const Places<Divisor, Index> places, int64_t n) {
  using P = Places<Divisor, Index>;
  for (int64_t i = first_element(); i < n; i += element_step()) {
    Index o = static_cast<Index>(i), tap = P::split(places.area, o);
    const Index plane = P::split(places.taps, tap);
    const int64_t iy = w.place(0, P::split(places.out_width, o), P::split(places.kernel_width, tap));
    const int64_t ix = w.place(1, o, tap);
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
    const auto run = [&]<class Divisor, class Index>() {
      launch(unfold<Element, Divisor, Index>, element_grid(launch, out.numel()), dim3(kThreads), 0,
             static_cast<Element*>(out.data()), static_cast<const Element*>(x.data()), w,
             Places<Divisor, Index>(w), out.numel());
    };
    if (out.numel() < int64_t{1} << 31)
      run.template operator()<FastDivisor, uint32_t>();
    else
      run.template operator()<WideDivisor, int64_t>();
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
