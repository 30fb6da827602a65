// searchsorted: a binary search a value, in the row of the sequence that the value belongs to.
#include "core/tensor_iterator.h"
#include "cpu/kernels/dense_rows.h"

namespace vt::cpu::VT_ISA {
namespace {

/// The first position of sorted row `row` whose element is not before `value`: not less, or with
/// `right` greater. nan belongs at the end. `order` holds the row's sorted order, or is null.
template <class T>
int64_t bound(const T* row, const int64_t* order, int64_t length, T value, bool right) {
  int64_t low = 0, count = length;
  while (count > 0) {
    const int64_t half = count / 2;
    const T middle = row[order ? order[low + half] : low + half];
    if (right ? !(middle > value) : !(middle >= value)) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

void searchsorted(const Tensor& out, const Tensor& sequence, const Tensor& values, bool, bool right,
                  std::optional<std::string_view> side, const Tensor& sorter) {
  if (out.numel() == 0) return;
  const bool after = right || side == "right";
  const Tensor* both[] = {&sequence, &values};
  const int64_t length = sequence.size(-1);
  const int64_t per_row =
      sequence.dim() == 1 ? values.numel() : std::max<int64_t>(values.size(-1), 1);
  const Tensor order = dense(sorter);
  const auto* orders = order.defined() ? order.data_as<int64_t>() : nullptr;
  if (orders) {
    for (int64_t i = 0; i < order.numel(); ++i) {
      check_index(orders[i] >= 0 && orders[i] < length, "torch.searchsorted(): sorter index ",
                  orders[i], " is out of range for a sequence of length ", length);
    }
  }
  visit_numeric(result_type(both), [&]<class T>() {
    const Tensor rows = dense_as(sequence, DTypeOf<T>::value),
                 wanted = dense_as(values, DTypeOf<T>::value);
    const T *row = rows.data_as<T>(), *value = wanted.data_as<T>();
    parallel_for(0, values.numel(), 2048, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i / per_row * length;
        const int64_t at =
            bound(row + start, orders ? orders + start : nullptr, length, value[i], after);
        if (out.dtype() == DType::Int32)
          out.data_as<int32_t>()[i] = static_cast<int32_t>(at);
        else
          out.data_as<int64_t>()[i] = at;
      }
    });
  });
}

const RegisterCpu registered([](KernelTable& t) { t.searchsorted = searchsorted; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
