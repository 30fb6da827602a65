// embedding: rows of a table by index, and the gradient of the table.
#include <cstring>

#include "cpu/kernels/dense_rows.h"

namespace vt::cpu::VT_ISA {
namespace {

void forward(const Tensor& out, const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  const Tensor index = dense_as(indices, DType::Int64);
  const Tensor table = weight.strides()[1] == 1 || weight.sizes()[1] <= 1 ? weight : dense(weight);
  const int64_t rows = weight.sizes()[0], width = weight.sizes()[1], n = index.numel();
  const int64_t bytes = width * weight.itemsize(), step = table.strides()[0] * weight.itemsize();
  const int64_t* at = index.data_as<int64_t>();
  parallel_for(0, n, row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      check_index(at[i] >= 0 && at[i] < rows, "index out of range in self (embedding: index ",
                  at[i], " in a table of ", rows, " rows)");
      if (bytes > 0) {
        std::memcpy(static_cast<char*>(out.data()) + i * bytes,
                    static_cast<const char*>(table.data()) + at[i] * step,
                    static_cast<size_t>(bytes));
      }
    }
  });
}

/// Each part of the columns is summed by one thread in index order: the same sums on any number
/// of threads.
void backward(const Tensor& out, const Tensor& grad_output, const Tensor& indices,
              int64_t num_weights, int64_t padding_idx, bool scale_grad_by_freq) {
  const Tensor index = dense_as(indices, DType::Int64);
  const int64_t width = out.sizes()[1], n = index.numel();
  if (out.numel() == 0) return;
  const int64_t* at = index.data_as<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    check_index(at[i] >= 0 && at[i] < num_weights, "index out of range in self (embedding: index ",
                at[i], " in a table of ", num_weights, " rows)");
  }
  visit_float(out.dtype(), [&]<class T>() {
    const Tensor sums =
        out.dtype() == DTypeOf<T>::value ? out : empty(out.sizes(), DTypeOf<T>::value);
    const Tensor g = dense(grad_output);
    std::vector<T> share;
    if (scale_grad_by_freq) {
      share.assign(static_cast<size_t>(num_weights), T(0));
      for (int64_t i = 0; i < n; ++i) share[at[i]] += T(1);
      for (T& s : share) s = s > 0 ? T(1) / s : T(0);
    }
    T* base = sums.data_as<T>();
    const int64_t size = g.itemsize();
    constexpr int64_t kColumns = 32;
    parallel_chunks((width + kColumns - 1) / kColumns, [&](int64_t part) {
      const int64_t first = part * kColumns, count = std::min(kColumns, width - first);
      T row[kColumns];
      for (int64_t r = 0; r < num_weights; ++r)
        std::fill(base + r * width + first, base + r * width + first + count, T(0));
      for (int64_t i = 0; i < n; ++i) {
        if (at[i] == padding_idx) continue;
        const T* source = row;
        if (g.dtype() == DTypeOf<T>::value) {
          source = g.data_as<T>() + i * width + first;
        } else {
          load_block<T>(row, static_cast<const char*>(g.data()) + (i * width + first) * size, size,
                        count, g.dtype(), DTypeOf<T>::value);
        }
        T* target = base + at[i] * width + first;
        if (scale_grad_by_freq) {
          const T factor = share[at[i]];
          for (int64_t c = 0; c < count; ++c) target[c] += source[c] * factor;
        } else {
          for (int64_t c = 0; c < count; ++c) target[c] += source[c];
        }
      }
    });
    if (!sums.is_same(out)) kernels_for(DeviceType::CPU).copy_(out, sums, false);
  });
}

const RegisterCpu register_embedding([](KernelTable& t) {
  t.embedding = forward;
  t.embedding_dense_backward = backward;
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
