// Many tensors converted to other dtypes in one launch.
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/multi_tensor.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

template <class T, int W>
__device__ inline void convert_piece(const Elements& to, const Elements& from, int64_t i) {
  T values[W];
  from.load<W>(i, values);
  to.store<W>(i, values);
}

__global__ void __launch_bounds__(kMultiThreads)
    convert_chunks(const __grid_constant__ TensorTable<2> table) {
  const int k = table.find(static_cast<int>(blockIdx.x));
  const int64_t begin = (blockIdx.x - table.first_block[k]) * kChunkElements;
  const int64_t left = table.numel[k] - begin, n = left < kChunkElements ? left : kChunkElements;
  Elements from, to;
  from.data = table.data[0][k];
  from.dtype = table.dtype[0][k];
  to.data = table.data[1][k];
  to.dtype = table.dtype[1][k];
  if (from.dtype == DType::Float64 || to.dtype == DType::Float64) {
    for (int64_t i = threadIdx.x; i < n; i += kMultiThreads)
      convert_piece<double, 1>(to, from, begin + i);
    return;
  }
  const int64_t body = table.aligned[k] ? n / 4 * 4 : 0;
  for (int64_t i = threadIdx.x * 4; i < body; i += kMultiThreads * 4)
    convert_piece<float, 4>(to, from, begin + i);
  for (int64_t i = body + threadIdx.x; i < n; i += kMultiThreads)
    convert_piece<float, 1>(to, from, begin + i);
}

void convert_all(TensorSpan self, TensorSpan sources) {
  check(self.size() == sources.size(), "_convert_all_: lists of tensors must have the same length, "
        "got ", self.size(), " and ", sources.size());
  if (self.empty()) return;
  for (size_t i = 0; i < self.size(); ++i) {
    if (!is_floating(self[i].dtype()) || !is_floating(sources[i].dtype()))
      fail(ErrorKind::NotImplemented, "\"_convert_all_\" not implemented for '", sources[i].dtype(),
           "' and '", self[i].dtype(), "'");
  }
  const Launch launch(self[0].device());
  const DenseLists<2> lists({sources, self}, 0b10);
  for_each_table(lists, nullptr, 0, [&](Stored, const TensorTable<2>& table, int32_t blocks) {
    launch(convert_chunks, dim3(static_cast<unsigned>(blocks)), dim3(kMultiThreads), 0, table);
  });
  lists.write_back();
}

const RegisterCuda registered([](KernelTable& t) { t._convert_all_ = convert_all; });

}  // namespace
}  // namespace vt::cuda
