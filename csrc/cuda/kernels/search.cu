// searchsorted: a binary search a value, a thread each, in the row of the sequence that the value
// belongs to. The same comparisons as on the CPU, so nan belongs at the end.
#include "core/tensor_iterator.h"
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/failure.cuh"
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

struct Search {
  const char* rows;
  const char* values;
  const int64_t* order;  // the sorted order of each row, or null; out-of-range entries stop the kernel
  void* out;
  int64_t count, per_row, length;
  DType dtype;
  bool narrow, right;
  FailureSlot* failure;
};

template <class T>
__global__ void __launch_bounds__(256) search(Search s) {
  const int64_t size = item_size(s.dtype);
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < s.count;
       i += int64_t{gridDim.x} * 256) {
    const T value = load_as<T>(s.values + i * size, s.dtype);
    const int64_t start = i / s.per_row * s.length;
    int64_t low = 0, count = s.length;
    while (count > 0) {
      const int64_t half = count / 2;
      int64_t at = low + half;
      if (s.order) {
        at = s.order[start + at];
        if (at < 0 || at >= s.length)
          stop_kernel(s.failure, FailedCheck::SearchSorted, at, s.length);
      }
      const T middle = load_as<T>(s.rows + (start + at) * size, s.dtype);
      if (s.right ? !(middle > value) : !(middle >= value)) {
        low += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
    if (s.narrow)
      static_cast<int32_t*>(s.out)[i] = static_cast<int32_t>(low);
    else
      static_cast<int64_t*>(s.out)[i] = low;
  }
}

Tensor dense_on(const Tensor& t, DType dtype, Device device) {
  if (t.dtype() == dtype && t.device() == device) return contiguous(t);
  const Tensor out = empty(t.sizes(), dtype, device);
  copy(out, t, true);
  return out;
}

void searchsorted(const Tensor& out, const Tensor& sequence, const Tensor& values, bool, bool right,
                  std::optional<std::string_view> side, const Tensor& sorter) {
  if (out.numel() == 0) return;
  const Tensor* both[] = {&sequence, &values};
  const DType dtype = result_type(both);
  const Tensor rows = dense_on(sequence, dtype, out.device()),
               wanted = dense_on(values, dtype, out.device());
  const Tensor order = sorter.defined() ? contiguous(sorter) : Tensor();
  const int64_t count = out.numel();
  const Search s{static_cast<const char*>(rows.data()),
                 static_cast<const char*>(wanted.data()),
                 order.defined() ? order.data_as<int64_t>() : nullptr,
                 out.data(),
                 count,
                 sequence.dim() == 1 ? count : std::max<int64_t>(values.size(-1), 1),
                 sequence.size(-1),
                 dtype,
                 out.dtype() == DType::Int32,
                 right || side == "right",
                 failure_slot(out.device().index)};
  const Launch launch(out.device());
  visit_compute_numeric(dtype, [&]<class T>() {
    launch(search<T>, dim3(static_cast<unsigned>(launch.fill(ceil_div<int64_t>(count, 256), 256))),
           dim3(256), 0, s);
  });
}

const RegisterCuda registered([](KernelTable& t) { t.searchsorted = searchsorted; });

}  // namespace
}  // namespace vt::cuda
