// Pools over the last two dimensions, forward and backward. Every element of a result, gradients
// included, has one owner that sums in a fixed order.
#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/windows.cuh"

namespace vt::cuda {
namespace {
using namespace windows;

// --- Largest values -----------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(kThreads)
    max_pool_kernel(S* values, int64_t* places, const S* in, const __grid_constant__ Windows w,
                    int64_t n) {
  using T = Compute<S>;
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t plane = i / w.out_area(), o = i - plane * w.out_area();
    const int64_t oy = o / w.out[1], ox = o % w.out[1];
    const S* source = in + plane * w.in_area();
    T best{};
    int64_t place = -1;
    for (int64_t ky = 0; ky < w.kernel[0]; ++ky) {
      const int64_t iy = w.place(0, oy, ky);
      if (iy < 0 || iy >= w.in[0]) continue;
      for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
        const int64_t ix = w.place(1, ox, kx);
        if (ix < 0 || ix >= w.in[1]) continue;
        const T v = convert<T>(source[iy * w.in[1] + ix]);
        if (place < 0 || v > best || v != v) {
          best = v;
          place = iy * w.in[1] + ix;
        }
      }
    }
    values[i] = convert<S>(best);
    places[i] = place < 0 ? 0 : place;
  }
}

void max_pool(const Tensor& values, const Tensor& indices, const Tensor& self, IntSpan kernel,
              IntSpan stride, IntSpan padding, IntSpan dilation, bool) {
  if (values.numel() == 0) return;
  const Windows w(self.sizes(), values.sizes(), kernel, stride, padding, dilation);
  const Launch launch(self.device());
  const Tensor x = dense(self);
  visit_storage(self.dtype(), [&]<class S>() {
    launch(max_pool_kernel<S>, element_grid(launch, values.numel()), dim3(kThreads), 0,
           values.data_as<S>(), indices.data_as<int64_t>(), x.data_as<S>(), w, values.numel());
  });
}

constexpr int kPlaneThreads = 512;
constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

/// Adds gradients of maxima where the maxima were, a plane a block. A place may be the maximum of
/// several windows: rounds hand it to one window at a time, lowest first, until all have added.
/// `next` and `last` (the window whose turn it is; the last that added) have a number per place.
template <class S>
__global__ void __launch_bounds__(kPlaneThreads)
    add_to_maxima(Compute<S>* out, const S* grad, const int64_t* places, int32_t* next,
                  int32_t* last, int64_t planes, int64_t area, int64_t count,
                  FailureSlot* failure) {
  using T = Compute<S>;
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    T* target = out + plane * area;
    // Scratch belongs to the block: the next plane uses it again.
    int32_t* turn = next + blockIdx.x * area;
    int32_t* done = last + blockIdx.x * area;
    for (int64_t i = threadIdx.x; i < area; i += kPlaneThreads) {
      target[i] = T(0);
      turn[i] = kNobody;
      done[i] = -1;
    }
    bool waiting = true;
    while (__syncthreads_or(waiting)) {
      waiting = false;
      for (int64_t o = threadIdx.x; o < count; o += kPlaneThreads) {
        const int64_t place = places[plane * count + o];
        if (place < 0 || place >= area)
          stop_kernel(failure, FailedCheck::MaxPoolBackward, place, area);
        if (done[place] < o) atomicMin(turn + place, static_cast<int32_t>(o));
      }
      __syncthreads();
      for (int64_t o = threadIdx.x; o < count; o += kPlaneThreads) {
        const int64_t place = places[plane * count + o];
        if (done[place] >= o) continue;
        // Only the window in turn changes the place, and those after it do not ask again before
        // the next round.
        if (atomicAdd(turn + place, 0) == static_cast<int32_t>(o)) {
          target[place] += convert<T>(grad[plane * count + o]);
        } else {
          waiting = true;
        }
      }
      __syncthreads();
      for (int64_t o = threadIdx.x; o < count; o += kPlaneThreads) {
        const int64_t place = places[plane * count + o];
        if (turn[place] == static_cast<int32_t>(o)) {
          done[place] = static_cast<int32_t>(o);
          turn[place] = kNobody;
        }
      }
    }
  }
}

void max_pool_backward(const Tensor& out, const Tensor& grad, const Tensor& indices,
                       IntSpan sizes) {
  if (out.numel() == 0) return;
  const int64_t area = sizes[sizes.size() - 1] * sizes[sizes.size() - 2],
                planes = out.numel() / area;
  const Launch launch(out.device());
  const Tensor places = dense_as(indices, DType::Int64), g = dense_as(grad, out.dtype());
  const int64_t count = places.numel() / planes;
  check(count < kNobody, "max_pool2d_backward: planes of ", count,
        " windows are larger than supported");
  visit_float_storage(out.dtype(), [&]<class S>() {
    using T = Compute<S>;
    const Tensor y =
        std::is_same_v<S, T> ? out : empty(out.sizes(), DTypeOf<T>::value, out.device());
    const int64_t blocks = launch.fill(planes, kPlaneThreads, 2);
    const Scratch turns(static_cast<size_t>(2 * blocks * area) * sizeof(int32_t), launch);
    launch(add_to_maxima<S>, dim3(static_cast<unsigned>(blocks)), dim3(kPlaneThreads), 0,
           y.data_as<T>(), g.data_as<S>(), places.data_as<int64_t>(), turns.data<int32_t>(),
           turns.data<int32_t>() + blocks * area, planes, area, count,
           failure_slot(launch.device()));
    if (!y.is_same(out)) copy(out, y, true);
  });
}

// --- Means --------------------------------------------------------------------------------------

/// What a mean is divided by.
struct Divisor {
  bool count_padding;
  int64_t fixed;  // 0: none
};

/// Rows and columns of the input that a window of means covers.
struct Range {
  int64_t first[2], last[2], divisor;

  __device__ Range(const Windows& w, int64_t oy, int64_t ox, const Divisor& d) {
    int64_t padded = 1, inside = 1;
    const int64_t o[2] = {oy, ox};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t start = o[i] * w.stride[i] - w.padding[i];
      const int64_t end = start + w.kernel[i], limit = w.in[i] + w.padding[i];
      const int64_t stop = end < limit ? end : limit;
      padded *= stop - start;
      first[i] = start > 0 ? start : 0;
      last[i] = stop < w.in[i] ? stop : w.in[i];
      inside *= last[i] - first[i];
    }
    divisor = d.fixed ? d.fixed : d.count_padding ? padded : inside;
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    avg_pool_kernel(S* out, const S* in, const __grid_constant__ Windows w, Divisor divisor,
                    int64_t n) {
  using T = Compute<S>;
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t plane = i / w.out_area(), o = i - plane * w.out_area();
    const Range range(w, o / w.out[1], o % w.out[1], divisor);
    const S* source = in + plane * w.in_area();
    T total = T(0);
    for (int64_t r = range.first[0]; r < range.last[0]; ++r) {
      for (int64_t c = range.first[1]; c < range.last[1]; ++c)
        total += convert<T>(source[r * w.in[1] + c]);
    }
    out[i] = convert<S>(total / static_cast<T>(range.divisor));
  }
}

/// The windows [begin, end) that cover place `x` of an input dimension.
__device__ inline void covering(const Windows& w, int i, int64_t x, int64_t& begin, int64_t& end) {
  const int64_t from = x + w.padding[i] - w.kernel[i] + 1;
  begin = from > 0 ? (from + w.stride[i] - 1) / w.stride[i] : 0;
  const int64_t most = (x + w.padding[i]) / w.stride[i] + 1;
  end = most < w.out[i] ? most : w.out[i];
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    avg_pool_gradient(S* out, const S* grad, const __grid_constant__ Windows w, Divisor divisor,
                      int64_t n) {
  using T = Compute<S>;
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t plane = i / w.in_area(), place = i - plane * w.in_area();
    int64_t oy, y_end, x_begin, x_end;
    covering(w, 0, place / w.in[1], oy, y_end);
    covering(w, 1, place % w.in[1], x_begin, x_end);
    T total = T(0);
    for (; oy < y_end; ++oy) {
      for (int64_t ox = x_begin; ox < x_end; ++ox) {
        const Range range(w, oy, ox, divisor);
        total += convert<T>(grad[plane * w.out_area() + oy * w.out[1] + ox]) /
                 static_cast<T>(range.divisor);
      }
    }
    out[i] = convert<S>(total);
  }
}

void avg_pool(const Tensor& out, const Tensor& self, IntSpan kernel, IntSpan stride,
              IntSpan padding, bool, bool count_padding, std::optional<int64_t> divisor) {
  if (out.numel() == 0) return;
  const Windows w(self.sizes(), out.sizes(), kernel, stride, padding, Dims{1, 1});
  const Launch launch(self.device());
  const Tensor x = dense(self);
  visit_float_storage(self.dtype(), [&]<class S>() {
    launch(avg_pool_kernel<S>, element_grid(launch, out.numel()), dim3(kThreads), 0,
           out.data_as<S>(), x.data_as<S>(), w, Divisor{count_padding, divisor.value_or(0)},
           out.numel());
  });
}

void avg_pool_backward(const Tensor& out, const Tensor& grad, IntSpan sizes, IntSpan kernel,
                       IntSpan stride, IntSpan padding, bool, bool count_padding,
                       std::optional<int64_t> divisor) {
  if (out.numel() == 0) return;
  const Windows w(sizes, grad.sizes(), kernel, stride, padding, Dims{1, 1});
  const Launch launch(out.device());
  const Tensor g = dense_as(grad, out.dtype());
  visit_float_storage(out.dtype(), [&]<class S>() {
    launch(avg_pool_gradient<S>, element_grid(launch, out.numel()), dim3(kThreads), 0,
           out.data_as<S>(), g.data_as<S>(), w, Divisor{count_padding, divisor.value_or(0)},
           out.numel());
  });
}

// --- Adaptive means -----------------------------------------------------------------------------

/// The input range of adaptive window `o` of `out`.
struct AdaptiveRange {
  int64_t begin, end;
  __device__ AdaptiveRange(int64_t o, int64_t out, int64_t in)
      : begin(o * in / out), end(((o + 1) * in + out - 1) / out) {}
};

struct Planes {
  int64_t in[2], out[2];
};

/// One warp a window, when windows are large; else `lanes` is 1 and a thread has a window.
template <class S>
__global__ void __launch_bounds__(kThreads)
    adaptive_pool_kernel(S* out, const S* in, Planes p, int64_t n, int lanes) {
  using T = Compute<S>;
  const int lane = threadIdx.x % lanes;
  for (int64_t i = first_element() / lanes; i < n; i += element_step() / lanes) {
    const S* plane = in + i / (p.out[0] * p.out[1]) * p.in[0] * p.in[1];
    const AdaptiveRange rows(i / p.out[1] % p.out[0], p.out[0], p.in[0]),
        cols(i % p.out[1], p.out[1], p.in[1]);
    const int64_t width = cols.end - cols.begin, area = (rows.end - rows.begin) * width;
    T total = T(0);
    for (int64_t k = lane; k < area; k += lanes)
      total += convert<T>(plane[(rows.begin + k / width) * p.in[1] + cols.begin + k % width]);
    if (lanes == kWarp) {
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, mask);
    }
    if (lane == 0) out[i] = convert<S>(total / static_cast<T>(area));
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    adaptive_pool_gradient(S* out, const S* grad, Planes p, int64_t n) {
  using T = Compute<S>;
  const int64_t in_area = p.in[0] * p.in[1], out_area = p.out[0] * p.out[1];
  for (int64_t i = first_element(); i < n; i += element_step()) {
    const int64_t plane = i / in_area, y = i % in_area / p.in[1], x = i % p.in[1];
    // The windows that cover the place.
    const int64_t y_end = ((y + 1) * p.out[0] + p.in[0] - 1) / p.in[0];
    const int64_t x_begin = x * p.out[1] / p.in[1];
    const int64_t x_end = ((x + 1) * p.out[1] + p.in[1] - 1) / p.in[1];
    T total = T(0);
    for (int64_t oy = y * p.out[0] / p.in[0]; oy < y_end; ++oy) {
      const AdaptiveRange rows(oy, p.out[0], p.in[0]);
      for (int64_t ox = x_begin; ox < x_end; ++ox) {
        const AdaptiveRange cols(ox, p.out[1], p.in[1]);
        total += convert<T>(grad[plane * out_area + oy * p.out[1] + ox]) /
                 static_cast<T>((rows.end - rows.begin) * (cols.end - cols.begin));
      }
    }
    out[i] = convert<S>(total);
  }
}

void adaptive_avg_pool(const Tensor& out, const Tensor& self, IntSpan) {
  if (out.numel() == 0) return;
  const Planes p{{self.size(-2), self.size(-1)}, {out.size(-2), out.size(-1)}};
  const Launch launch(self.device());
  const Tensor x = dense(self);
  const int lanes = p.in[0] * p.in[1] >= 64 * p.out[0] * p.out[1] ? kWarp : 1;
  visit_float_storage(self.dtype(), [&]<class S>() {
    launch(adaptive_pool_kernel<S>, element_grid(launch, out.numel() * lanes), dim3(kThreads), 0,
           out.data_as<S>(), x.data_as<S>(), p, out.numel(), lanes);
  });
}

void adaptive_avg_pool_backward(const Tensor& out, const Tensor& grad, IntSpan) {
  if (out.numel() == 0) return;
  const Planes p{{out.size(-2), out.size(-1)}, {grad.size(-2), grad.size(-1)}};
  const Launch launch(out.device());
  const Tensor g = dense_as(grad, out.dtype());
  visit_float_storage(out.dtype(), [&]<class S>() {
    launch(adaptive_pool_gradient<S>, element_grid(launch, out.numel()), dim3(kThreads), 0,
           out.data_as<S>(), g.data_as<S>(), p, out.numel());
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.max_pool2d_with_indices = max_pool;
  t.max_pool2d_backward = max_pool_backward;
  t.avg_pool2d = avg_pool;
  t.avg_pool2d_backward = avg_pool_backward;
  t.adaptive_avg_pool2d = adaptive_avg_pool;
  t.adaptive_avg_pool2d_backward = adaptive_avg_pool_backward;
});

}  // namespace
}  // namespace vt::cuda
