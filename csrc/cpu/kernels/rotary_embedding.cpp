// Rotary position embedding: pairs of features turned by position-dependent angles.
// Source: Su et al., "RoFormer", 2021.
#include "cpu/kernels/dense_rows.h"

namespace vt::cpu::VT_ISA {
namespace {

void rotary_kernel(const Tensor& out, const Tensor& self, const Tensor& cos, const Tensor& sin,
                   bool interleaved) {
  const int64_t n = self.dim(), width = self.sizes()[n - 1], half = width / 2;
  if (self.numel() == 0) return;
  visit_float(self.dtype(), [&]<class T>() {
    const Tensor x = dense(self), c = dense_as(cos, DTypeOf<T>::value),
                 s = dense_as(sin, DTypeOf<T>::value);
    const int64_t rows = x.numel() / width;
    // Row of the tables that row r of x uses: leading dimensions broadcast.
    Dims steps(static_cast<size_t>(n - 1), 0);
    int64_t step = 1;
    for (int64_t d = c.dim() - 2; d >= 0; --d) {
      const int64_t at = d + n - c.dim();
      steps[at] = c.sizes()[d] == 1 ? 0 : step;
      step *= c.sizes()[d];
    }
    parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
      T* in_row = x.dtype() == DTypeOf<T>::value ? nullptr : scratch<T>(Scratch::Row0, width);
      T* out_row = out.dtype() == DTypeOf<T>::value ? nullptr : scratch<T>(Scratch::Row1, width);
      for (int64_t r = begin; r < end; ++r) {
        int64_t rest = r, table = 0;
        for (int64_t d = n - 2; d >= 0; --d) {
          table += rest % x.sizes()[d] * steps[d];
          rest /= x.sizes()[d];
        }
        const T* a = load_row<T>(x.data(), x.dtype(), r * width, width, in_row);
        T* y = row_target<T>(out.data(), out.dtype(), r * width, out_row);
        const T* co = c.data_as<T>() + table * half;
        const T* si = s.data_as<T>() + table * half;
        if (interleaved) {
          for (int64_t i = 0; i < half; ++i) {
            // The result may lie where the input does.
            const T even = a[2 * i], odd = a[2 * i + 1];
            y[2 * i] = even * co[i] - odd * si[i];
            y[2 * i + 1] = odd * co[i] + even * si[i];
          }
        } else {
          for (int64_t i = 0; i < half; ++i) {
            const T first = a[i], second = a[i + half];
            y[i] = first * co[i] - second * si[i];
            y[i + half] = second * co[i] + first * si[i];
          }
        }
        store_row<T>(out.data(), out.dtype(), r * width, width, y);
      }
    });
  });
}

const RegisterCpu register_rotary([](KernelTable& t) { t.rotary_embedding = rotary_kernel; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
