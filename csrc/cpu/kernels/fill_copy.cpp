// Fills, copies, ranges and triangles.
#include <cmath>
#include <cstring>

#include "core/overlap.h"
#include "core/parallel.h"
#include "core/view_geometry.h"
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // bytes a thread copies at least

void fill(const Tensor& self, const Tensor& value) {
  check(value.dim() == 0, "fill_ only supports 0-dimension value tensor but got tensor with ",
        value.dim(), " dimensions.");
  const Scalar number = value.item();
  if (self.numel() == 0) return;
  const bool zero = number.to_double() == 0 && !std::signbit(number.to_double());
  if (zero && self.is_non_overlapping_and_dense()) {
    auto* bytes = static_cast<char*>(self.data());
    parallel_for(0, self.numel() * self.itemsize(), 4 * kGrain, [&](int64_t b, int64_t e) {
      std::memset(bytes + b, 0, static_cast<size_t>(e - b));
    });
    return;
  }
  Tensor target = self;
  TensorIterator it;
  Tensor* outs[] = {&target};
  it.build(outs, {}, {.promote = Promote::None, .output_dtype = self.dtype(), .op = "fill_"});
  visit_all(self.dtype(), [&]<class T>() {
    const T v = number.to<T>();
    map_kernel(it, [v]() -> T { return v; });
  });
}

/// A dense 2-D transpose in tiles: rows of one side are columns of the other.
template <class T>
void transpose_tiles(char* out, const char* in, int64_t rows, int64_t columns, int64_t out_row,
                     int64_t in_column) {
  constexpr int64_t kTile = 16;
  parallel_for(0, (rows + kTile - 1) / kTile,
               std::max<int64_t>(1, kGrain / (columns * kTile * int64_t{sizeof(T)} + 1)),
               [&](int64_t b, int64_t e) {
                 for (int64_t r0 = b * kTile; r0 < std::min(e * kTile, rows); r0 += kTile) {
                   const int64_t r1 = std::min(r0 + kTile, rows);
                   for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
                     const int64_t c1 = std::min(c0 + kTile, columns);
                     for (int64_t r = r0; r < r1; ++r) {
                       auto* target = reinterpret_cast<T*>(out + r * out_row);
                       for (int64_t c = c0; c < c1; ++c)
                         target[c] = *reinterpret_cast<const T*>(in + r * int64_t{sizeof(T)} +
                                                                 c * in_column);
                     }
                   }
                 }
               });
}

bool copy_transposed(const TensorIterator& it) {
  // Dimension 0 is dense in one operand and dimension 1 in the other.
  if (it.ndim() != 2) return false;
  const int64_t size = item_size(it.dtype(0));
  const bool out_dense = it.stride(0, 0) == size && it.stride(1, 1) == size;
  const bool in_dense = it.stride(1, 0) == size && it.stride(0, 1) == size;
  if (!out_dense && !in_dense) return false;
  const int fast = out_dense ? 0 : 1;  // the dimension in which the output is dense
  const int64_t rows = it.shape()[1 - fast], columns = it.shape()[fast];
  auto run = [&]<class T>() {
    transpose_tiles<T>(it.data(0), it.data(1), rows, columns, it.stride(0, 1 - fast),
                       it.stride(1, fast));
  };
  switch (size) {
    case 1:
      run.template operator()<uint8_t>();
      break;
    case 2:
      run.template operator()<uint16_t>();
      break;
    case 4:
      run.template operator()<uint32_t>();
      break;
    default:
      run.template operator()<uint64_t>();
      break;
  }
  return true;
}

void copy(const Tensor& self, const Tensor& source, bool) {
  const Overlap overlap = memory_overlap(self, source);
  if (overlap == Overlap::Full) return;  // also where elements share a place
  if (overlap == Overlap::Partial) check_no_partial_overlap(self, source);
  const Tensor src =
      equal(self.sizes(), source.sizes()) ? source : broadcast_to(source, self.sizes());
  if (self.dtype() == src.dtype() && self.is_contiguous() && src.is_contiguous() &&
      equal(self.sizes(), src.sizes())) {
    const auto* from = static_cast<const char*>(src.data());
    auto* to = static_cast<char*>(self.data());
    if (from == to) return;
    parallel_for(0, self.numel() * self.itemsize(), 4 * kGrain, [&](int64_t b, int64_t e) {
      std::memmove(to + b, from + b, static_cast<size_t>(e - b));
    });
    return;
  }
  Tensor target = self;
  TensorIterator it;
  it.unary(target, src,
           {.promote = Promote::None,
            .output_dtype = src.dtype(),
            .op = "copy_",
            .check_output_cast = false});
  if (self.dtype() != src.dtype()) {
    visit_all(src.dtype(), [&]<class T>() { map_kernel(it, [](T x) -> T { return x; }); });
    return;
  }
  if (copy_transposed(it)) return;
  // Bytes only: one instance a size.
  auto run = [&]<class T>() {
    it.for_each([](char** data, const int64_t* strides, int64_t n) {
      if (strides[0] == sizeof(T) && strides[1] == sizeof(T)) {
        std::memmove(data[0], data[1], static_cast<size_t>(n) * sizeof(T));
        return;
      }
      for (int64_t i = 0; i < n; ++i) {
        *reinterpret_cast<T*>(data[0] + i * strides[0]) =
            *reinterpret_cast<const T*>(data[1] + i * strides[1]);
      }
    });
  };
  switch (self.itemsize()) {
    case 1:
      run.template operator()<uint8_t>();
      break;
    case 2:
      run.template operator()<uint16_t>();
      break;
    case 4:
      run.template operator()<uint32_t>();
      break;
    default:
      run.template operator()<uint64_t>();
      break;
  }
}

void arange(const Tensor& self, const Scalar& start, const Scalar& step) {
  visit_numeric(self.dtype(), [&]<class T>() {
    T buffer[kBlock];
    for (int64_t i = 0; i < self.numel(); i += kBlock) {
      const int64_t m = std::min(kBlock, self.numel() - i);
      if constexpr (std::is_floating_point_v<T>) {
        const double first = start.to_double(), by = step.to_double();
        for (int64_t k = 0; k < m; ++k)
          buffer[k] = static_cast<T>(first + by * static_cast<double>(i + k));
      } else {
        const int64_t first = start.to_int(), by = step.to_int();
        for (int64_t k = 0; k < m; ++k) buffer[k] = static_cast<T>(first + by * (i + k));
      }
      store_block<T>(static_cast<char*>(self.data()) + i * self.itemsize(), self.itemsize(), buffer,
                     m, self.dtype());
    }
  });
}

/// Rows of the last two dimensions of a contiguous output; `keep(row)` gives the kept column range.
template <class Keep>
void triangle(const Tensor& out, const Tensor& self, Keep&& keep) {
  copy(out, self, false);
  const int64_t rows = out.size(-2), columns = out.size(-1);
  const int64_t size = out.itemsize(),
                batches = columns * rows == 0 ? 0 : out.numel() / (rows * columns);
  auto* data = static_cast<char*>(out.data());
  parallel_for(0, batches * rows, std::max<int64_t>(1, kGrain / (columns * size + 1)),
               [&](int64_t b, int64_t e) {
                 for (int64_t r = b; r < e; ++r) {
                   const auto [first, last] = keep(r % rows, columns);
                   char* row = data + r * columns * size;
                   std::memset(row, 0, static_cast<size_t>(first * size));
                   std::memset(row + last * size, 0, static_cast<size_t>((columns - last) * size));
                 }
               });
}

const RegisterCpu registered([](KernelTable& t) {
  t.fill_ = fill;
  t.copy_ = copy;
  t.clone = [](const Tensor& out, const Tensor& self, std::optional<MemoryFormat>) {
    copy(out, self, false);
  };
  t._arange_ = arange;
  t.tril = [](const Tensor& out, const Tensor& self, int64_t diagonal) {
    triangle(out, self, [=](int64_t row, int64_t columns) {
      return std::pair<int64_t, int64_t>(0, std::clamp<int64_t>(row + diagonal + 1, 0, columns));
    });
  };
  t.triu = [](const Tensor& out, const Tensor& self, int64_t diagonal) {
    triangle(out, self, [=](int64_t row, int64_t columns) {
      return std::pair<int64_t, int64_t>(std::clamp<int64_t>(row + diagonal, 0, columns), columns);
    });
  };
});

}  // namespace
}  // namespace vt::cpu::VT_ISA
