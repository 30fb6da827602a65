// Ranges and triangles.
#include <algorithm>

#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

/// first + i * step, in the type a CPU would count in.
template <class T>
__global__ void __launch_bounds__(kBlock)
    arange_kernel(char* out, DType dtype, int64_t itemsize, T first, T step, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * kBlock;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n; i += stride) {
    const T value = first + step * static_cast<T>(i);
    // A 16-bit float is rounded from float, as everywhere.
    if constexpr (std::is_same_v<T, double>) {
      if (dtype != DType::Float64) {
        store_as<float>(out + i * itemsize, dtype, static_cast<float>(value));
        continue;
      }
    }
    store_as<T>(out + i * itemsize, dtype, value);
  }
}

void arange(const Tensor& self, const Scalar& start, const Scalar& step) {
  const int64_t n = self.numel();
  visit_compute_numeric(self.dtype(), [&]<class T>() {
    if (n == 0) return;
    using Counter = std::conditional_t<std::is_same_v<T, int64_t>, int64_t, double>;
    const Launch launch(self.device());
    launch(arange_kernel<Counter>, dim3(launch.fill(ceil_div<int64_t>(n, kBlock), kBlock)),
           dim3(kBlock), 0, self.data_as<char>(), self.dtype(), self.itemsize(),
           start.to<Counter>(), step.to<Counter>(), n);
  });
}

/// Element (row, column) of the last two dimensions stays where column - row is at most (lower) or
/// at least (upper) the diagonal. A block takes part of one row.
template <class W>
__global__ void __launch_bounds__(kBlock)
    triangle_kernel(W* out, const W* in, int64_t rows, int64_t columns, int64_t all_rows,
                    int64_t diagonal, bool lower) {
  for (int64_t r = blockIdx.x; r < all_rows; r += gridDim.x) {
    const int64_t limit = r % rows + diagonal;
    for (int64_t c = int64_t{blockIdx.y} * kBlock + threadIdx.x; c < columns;
         c += int64_t{gridDim.y} * kBlock) {
      const bool keep = lower ? c <= limit : c >= limit;
      out[r * columns + c] = keep ? in[r * columns + c] : W(0);
    }
  }
}

void triangle(const Tensor& out, const Tensor& self, int64_t diagonal, bool lower) {
  const int64_t rows = out.size(-2), columns = out.size(-1);
  if (out.numel() == 0) return;
  const Launch launch(out.device());
  const Tensor source = contiguous(self);
  const int64_t all_rows = out.numel() / columns;
  // |diagonal| past the extents keeps all or nothing; the sum above must not overflow.
  const int64_t bounded = std::clamp(diagonal, -rows - 1, columns + 1);
  const int64_t across = std::min<int64_t>(ceil_div<int64_t>(columns, kBlock), 16);
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(all_rows, 1 << 20)),
                  static_cast<uint32_t>(across));
  visit_width(out.itemsize(), [&]<class W>() {
    launch(triangle_kernel<W>, grid, dim3(kBlock), 0, out.data_as<W>(), source.data_as<W>(), rows,
           columns, all_rows, bounded, lower);
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t._arange_ = arange;
  t.tril = [](const Tensor& out, const Tensor& self, int64_t diagonal) {
    triangle(out, self, diagonal, true);
  };
  t.triu = [](const Tensor& out, const Tensor& self, int64_t diagonal) {
    triangle(out, self, diagonal, false);
  };
});

}  // namespace
}  // namespace vt::cuda
