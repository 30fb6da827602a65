// _scaled_mm: products of 8-bit floats with scales. The operands are widened to float, which is
// exact, multiplied by gemm.h, and scaled and rounded once, block by block as they are complete.
#include "core/parallel.h"
#include "cpu/kernels/dense_rows.h"
#include "cpu/kernels/gemm.h"

namespace vt::cpu::VT_ISA {
namespace {

/// `t` as floats, dense along the dimension that is dense in it.
Tensor widened(const Tensor& t) {
  const bool by_column = t.strides()[0] == 1 && t.strides()[1] != 1;
  const Dims strides = by_column ? Dims{1, t.sizes()[0]} : Dims{t.sizes()[1], 1};
  const Tensor out = empty_strided(t.sizes(), strides, DType::Float32, t.device());
  kernels_for(DeviceType::CPU).copy_(out, t, false);
  return out;
}

MatrixRef matrix(const Tensor& t) { return {t.data(), t.strides()[0], t.strides()[1]}; }

void scaled_mm(const Tensor& out, const Tensor& self, const Tensor& mat2, const Tensor& scale_a,
               const Tensor& scale_b, const Tensor& bias, const Tensor& scale_result,
               std::optional<DType>, bool) {
  if (out.numel() == 0) return;
  const int64_t m = self.sizes()[0], k = self.sizes()[1], n = mat2.sizes()[1];
  const DType type = out.dtype();
  const Tensor product =
      type == DType::Float32 ? out : empty(out.sizes(), DType::Float32, out.device());
  const Tensor wide_bias = dense_as(bias, DType::Float32);
  const auto* row_scale = scale_a.data_as<float>();
  const auto* column_scale = scale_b.data_as<float>();
  const bool by_row = scale_a.numel() != 1, by_column = scale_b.numel() != 1;
  const auto* added = bias.defined() ? wide_bias.data_as<float>() : nullptr;
  const float last =
      scale_result.defined() && is_float8(type) ? *scale_result.data_as<float>() : 1.0f;

  auto* sums = product.data_as<float>();
  const BlockDone finish = [&](const Block& block) {
    for (int64_t i = block.row; i < block.row + block.rows; ++i) {
      float* row = sums + i * n + block.column;
      const float by = row_scale[by_row ? i : 0];
      const float* columns = column_scale + (by_column ? block.column : 0);
      for (int64_t j = 0; j < block.columns; ++j) {
        float x = row[j] * by * columns[by_column ? j : 0];
        if (added) x += added[block.column + j];
        row[j] = x / last;
      }
      if (type != DType::Float32)
        store_block<float>(static_cast<char*>(out.data()) + (i * n + block.column) * out.itemsize(),
                           out.itemsize(), row, block.columns, type);
    }
  };
  if (k == 0) {
    std::fill_n(sums, m * n, 0.0f);
    return finish({0, 0, m, n});
  }
  const Tensor a = widened(self), b = widened(mat2);
  gemm(DType::Float32, {m, n, k}, 1, matrix(a), matrix(b), 0, sums, n, nullptr, &finish);
}

const RegisterCpu registered([](KernelTable& t) { t._scaled_mm = scaled_mm; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
