// im2col, col2im and the pools: sliding windows over the planes of (N, C, H, W). Planes are
// independent and spread over the threads.
#include <limits>

#include "cpu/kernels/dense_rows.h"

namespace vt::cpu::VT_ISA {
namespace {

int64_t at(IntSpan values, size_t i) { return values[values.size() == 1 ? 0 : i]; }

template <class T>
void add_to(T& sum, T value) {
  sum = static_cast<T>(sum + value);  // small integers are added as int
}

struct Windows {
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];

  Windows(IntSpan in_sizes, IntSpan out_sizes, IntSpan k, IntSpan s, IntSpan p, IntSpan d) {
    for (size_t i = 0; i < 2; ++i) {
      in[i] = in_sizes[in_sizes.size() - 2 + i];
      out[i] = out_sizes[out_sizes.size() - 2 + i];
      kernel[i] = at(k, i);
      stride[i] = at(s.empty() ? k : s, i);
      padding[i] = at(p, i);
      dilation[i] = at(d, i);
    }
  }
  int64_t in_area() const { return in[0] * in[1]; }
  int64_t out_area() const { return out[0] * out[1]; }
  /// Where element `tap` of window `o` lies in the input; outside it in the padding.
  int64_t place(int i, int64_t o, int64_t tap) const {
    return o * stride[i] - padding[i] + tap * dilation[i];
  }
};

template <class T, class F>
void as_type(const Tensor& out, const Tensor& in, const F& body) {
  const Tensor x = dense_as(in, DTypeOf<T>::value);
  const Tensor y = out.dtype() == DTypeOf<T>::value ? out : empty(out.sizes(), DTypeOf<T>::value);
  body.template operator()<T>(y.data_as<T>(), x.data_as<T>());
  if (!y.is_same(out)) kernels_for(DeviceType::CPU).copy_(out, y, false);
}
/// Runs `body` on floating operands in their compute type, then rounds the result.
template <class F>
void in_compute_type(const Tensor& out, const Tensor& in, const F& body) {
  visit_float(in.dtype(), [&]<class T>() { as_type<T>(out, in, body); });
}
/// As in_compute_type, for integers too.
template <class F>
void in_numeric_type(const Tensor& out, const Tensor& in, const F& body) {
  visit_numeric(in.dtype(), [&]<class T>() { as_type<T>(out, in, body); });
}
/// Runs `body` on the bits of the elements: it only moves them, and 0 is all zeros in every dtype.
template <class F>
void on_bits(const Tensor& out, const Tensor& in, const F& body) {
  const Tensor source = dense(in);
  const auto run = [&]<class T>() {
    body.template operator()<T>(static_cast<T*>(out.data()), static_cast<const T*>(source.data()));
  };
  switch (in.itemsize()) {
    case 1:
      return run.template operator()<uint8_t>();
    case 2:
      return run.template operator()<uint16_t>();
    case 4:
      return run.template operator()<uint32_t>();
    default:
      return run.template operator()<uint64_t>();
  }
}

void im2col(const Tensor& out, const Tensor& self, IntSpan kernel, IntSpan dilation,
            IntSpan padding, IntSpan stride) {
  if (out.numel() == 0) return;
  const auto s = self.sizes();
  const int64_t extents[2] = {
      (s[s.size() - 2] + 2 * at(padding, 0) - at(dilation, 0) * (at(kernel, 0) - 1) - 1) /
              at(stride, 0) +
          1,
      (s[s.size() - 1] + 2 * at(padding, 1) - at(dilation, 1) * (at(kernel, 1) - 1) - 1) /
              at(stride, 1) +
          1};
  const Windows w(s, extents, kernel, stride, padding, dilation);
  const int64_t taps = w.kernel[0] * w.kernel[1];
  on_bits(out, self, [&]<class T>(T* y, const T* x) {
    int64_t planes = 1;  // of an empty input too: its windows hold padding
    for (const int64_t n : s.first(s.size() - 2)) planes *= n;
    parallel_for(0, planes * taps, row_grain(w.out_area()), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* plane = x + row / taps * w.in_area();
        T* target = y + row * w.out_area();
        const int64_t ky = row % taps / w.kernel[1], kx = row % w.kernel[1];
        for (int64_t oy = 0; oy < w.out[0]; ++oy) {
          const int64_t iy = w.place(0, oy, ky);
          T* line = target + oy * w.out[1];
          if (iy < 0 || iy >= w.in[0]) {
            std::fill(line, line + w.out[1], T(0));
            continue;
          }
          const T* source = plane + iy * w.in[1];
          for (int64_t ox = 0; ox < w.out[1]; ++ox) {
            const int64_t ix = w.place(1, ox, kx);
            line[ox] = ix >= 0 && ix < w.in[1] ? source[ix] : T(0);
          }
        }
      }
    });
  });
}

void col2im(const Tensor& out, const Tensor& self, IntSpan output_size, IntSpan kernel,
            IntSpan dilation, IntSpan padding, IntSpan stride) {
  if (out.numel() == 0) return;
  int64_t extents[2];
  for (size_t i = 0; i < 2; ++i) {
    extents[i] =
        (at(output_size, i) + 2 * at(padding, i) - at(dilation, i) * (at(kernel, i) - 1) - 1) /
            at(stride, i) +
        1;
  }
  const Windows w(out.sizes(), extents, kernel, stride, padding, dilation);
  const int64_t taps = w.kernel[0] * w.kernel[1];
  in_numeric_type(out, self, [&]<class T>(T* y, const T* x) {
    parallel_for(0, out.numel() / w.in_area(), row_grain(w.out_area() * taps),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t plane = begin; plane < end; ++plane) {
                     T* target = y + plane * w.in_area();
                     std::fill(target, target + w.in_area(), T(0));
                     for (int64_t tap = 0; tap < taps; ++tap) {
                       const T* source = x + (plane * taps + tap) * w.out_area();
                       for (int64_t oy = 0; oy < w.out[0]; ++oy) {
                         const int64_t iy = w.place(0, oy, tap / w.kernel[1]);
                         if (iy < 0 || iy >= w.in[0]) continue;
                         for (int64_t ox = 0; ox < w.out[1]; ++ox) {
                           const int64_t ix = w.place(1, ox, tap % w.kernel[1]);
                           if (ix >= 0 && ix < w.in[1])
                             add_to(target[iy * w.in[1] + ix], source[oy * w.out[1] + ox]);
                         }
                       }
                     }
                   }
                 });
  });
}

template <class T>
void max_pool_planes(const Tensor& values, const Tensor& indices, const Tensor& self,
                     const Windows& w) {
  const T* x = self.data_as<T>();
  T* y = values.data_as<T>();
  int64_t* places = indices.data_as<int64_t>();
  parallel_for(0, self.numel() / w.in_area(), row_grain(w.in_area()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t plane = begin; plane < end; ++plane) {
                   const T* source = x + plane * w.in_area();
                   for (int64_t o = 0; o < w.out_area(); ++o) {
                     T best{};
                     int64_t place = -1;
                     for (int64_t ky = 0; ky < w.kernel[0]; ++ky) {
                       const int64_t iy = w.place(0, o / w.out[1], ky);
                       if (iy < 0 || iy >= w.in[0]) continue;
                       for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
                         const int64_t ix = w.place(1, o % w.out[1], kx);
                         if (ix < 0 || ix >= w.in[1]) continue;
                         const T v = source[iy * w.in[1] + ix];
                         if (place < 0 || v > best || v != v) {
                           best = v;
                           place = iy * w.in[1] + ix;
                         }
                       }
                     }
                     y[plane * w.out_area() + o] = best;
                     places[plane * w.out_area() + o] = std::max<int64_t>(place, 0);
                   }
                 }
               });
}

void max_pool(const Tensor& values, const Tensor& indices, const Tensor& self, IntSpan kernel,
              IntSpan stride, IntSpan padding, IntSpan dilation, bool) {
  if (values.numel() == 0) return;
  const Windows w(self.sizes(), values.sizes(), kernel, stride, padding, dilation);
  visit_numeric(self.dtype(), [&]<class T>() {
    const Tensor x = dense_as(self, DTypeOf<T>::value);
    const Tensor y =
        values.dtype() == DTypeOf<T>::value ? values : empty(values.sizes(), DTypeOf<T>::value);
    max_pool_planes<T>(y, indices, x, w);
    if (!y.is_same(values)) kernels_for(DeviceType::CPU).copy_(values, y, false);
  });
}

void max_pool_backward(const Tensor& out, const Tensor& grad, const Tensor& indices,
                       IntSpan sizes) {
  if (out.numel() == 0) return;
  const int64_t area = sizes[sizes.size() - 1] * sizes[sizes.size() - 2],
                planes = out.numel() / area;
  const Tensor places = dense(indices);
  const int64_t count = places.numel() / planes;
  in_compute_type(out, grad, [&]<class T>(T* y, const T* g) {
    parallel_for(0, planes, row_grain(area), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        T* target = y + plane * area;
        std::fill(target, target + area, T(0));
        const int64_t* at_place = places.data_as<int64_t>() + plane * count;
        for (int64_t o = 0; o < count; ++o) target[at_place[o]] += g[plane * count + o];
      }
    });
  });
}

/// Calls f(first row, end row, first column, end column, divisor) for window `o`.
template <class F>
void average_window(const Windows& w, int64_t o, bool count_padding, std::optional<int64_t> divisor,
                    const F& f) {
  int64_t first[2], last[2], padded = 1, inside = 1;
  for (int i = 0; i < 2; ++i) {
    const int64_t start = (i == 0 ? o / w.out[1] : o % w.out[1]) * w.stride[i] - w.padding[i];
    const int64_t stop = std::min(start + w.kernel[i], w.in[i] + w.padding[i]);
    padded *= stop - start;
    first[i] = std::max<int64_t>(start, 0);
    last[i] = std::min(stop, w.in[i]);
    inside *= last[i] - first[i];
  }
  f(first[0], last[0], first[1], last[1], divisor ? *divisor : count_padding ? padded : inside);
}

void avg_pool(const Tensor& out, const Tensor& self, IntSpan kernel, IntSpan stride,
              IntSpan padding, bool, bool count_padding, std::optional<int64_t> divisor) {
  if (out.numel() == 0) return;
  const Windows w(self.sizes(), out.sizes(), kernel, stride, padding, Dims{1, 1});
  in_numeric_type(out, self, [&]<class T>(T* y, const T* x) {
    parallel_for(0, out.numel(), row_grain(w.kernel[0] * w.kernel[1]),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const T* plane = x + i / w.out_area() * w.in_area();
                     average_window(w, i % w.out_area(), count_padding, divisor,
                                    [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1, int64_t n) {
                                      T total = 0;
                                      for (int64_t r = y0; r < y1; ++r) {
                                        for (int64_t c = x0; c < x1; ++c)
                                          total = static_cast<T>(total + plane[r * w.in[1] + c]);
                                      }
                                      y[i] = static_cast<T>(total / static_cast<T>(n));
                                    });
                   }
                 });
  });
}

void avg_pool_backward(const Tensor& out, const Tensor& grad, IntSpan sizes, IntSpan kernel,
                       IntSpan stride, IntSpan padding, bool, bool count_padding,
                       std::optional<int64_t> divisor) {
  if (out.numel() == 0) return;
  const Windows w(sizes, grad.sizes(), kernel, stride, padding, Dims{1, 1});
  in_compute_type(out, grad, [&]<class T>(T* y, const T* g) {
    parallel_for(
        0, out.numel() / w.in_area(), row_grain(w.in_area()), [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; ++p) {
            T* plane = y + p * w.in_area();
            std::fill(plane, plane + w.in_area(), T(0));
            for (int64_t o = 0; o < w.out_area(); ++o) {
              average_window(w, o, count_padding, divisor,
                             [&](int64_t y0, int64_t y1, int64_t x0, int64_t x1, int64_t n) {
                               const T share = g[p * w.out_area() + o] / static_cast<T>(n);
                               for (int64_t r = y0; r < y1; ++r) {
                                 for (int64_t c = x0; c < x1; ++c) plane[r * w.in[1] + c] += share;
                               }
                             });
            }
          }
        });
  });
}

struct Range {
  int64_t begin, end;
};
/// The input range of adaptive window `o` of `out`.
Range adaptive_range(int64_t o, int64_t out, int64_t in) {
  return {o * in / out, ((o + 1) * in + out - 1) / out};
}

void adaptive_avg_pool(const Tensor& out, const Tensor& self, IntSpan) {
  if (out.numel() == 0) return;
  const int64_t h = self.size(-2), wd = self.size(-1), oh = out.size(-2), ow = out.size(-1);
  in_compute_type(out, self, [&]<class T>(T* y, const T* x) {
    parallel_for(
        0, out.numel(), row_grain(h * wd / (oh * ow) + 1), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const T* plane = x + i / (oh * ow) * h * wd;
            const Range rows = adaptive_range(i / ow % oh, oh, h),
                        cols = adaptive_range(i % ow, ow, wd);
            T total = 0;
            for (int64_t r = rows.begin; r < rows.end; ++r) {
              for (int64_t c = cols.begin; c < cols.end; ++c) total += plane[r * wd + c];
            }
            y[i] = total / static_cast<T>((rows.end - rows.begin) * (cols.end - cols.begin));
          }
        });
  });
}

void adaptive_avg_pool_backward(const Tensor& out, const Tensor& grad, IntSpan) {
  if (out.numel() == 0) return;
  const int64_t h = out.size(-2), wd = out.size(-1), oh = grad.size(-2), ow = grad.size(-1);
  in_compute_type(out, grad, [&]<class T>(T* y, const T* g) {
    parallel_for(0, out.numel() / (h * wd), row_grain(h * wd), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        T* plane = y + p * h * wd;
        std::fill(plane, plane + h * wd, T(0));
        for (int64_t o = 0; o < oh * ow; ++o) {
          const Range rows = adaptive_range(o / ow, oh, h), cols = adaptive_range(o % ow, ow, wd);
          const T share = g[p * oh * ow + o] /
                          static_cast<T>((rows.end - rows.begin) * (cols.end - cols.begin));
          for (int64_t r = rows.begin; r < rows.end; ++r) {
            for (int64_t c = cols.begin; c < cols.end; ++c) plane[r * wd + c] += share;
          }
        }
      }
    });
  });
}

const RegisterCpu register_windows([](KernelTable& t) {
  t.im2col = im2col;
  t.col2im = col2im;
  t.max_pool2d_with_indices = max_pool;
  t.max_pool2d_backward = max_pool_backward;
  t.avg_pool2d = avg_pool;
  t.avg_pool2d_backward = avg_pool_backward;
  t.adaptive_avg_pool2d = adaptive_avg_pool;
  t.adaptive_avg_pool2d_backward = adaptive_avg_pool_backward;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
