// One launch over many tensors. A table of pointers and lengths travels in the kernel's parameters
// (no copy to the device, nothing to keep alive); a block finds the tensor it works on by binary
// search and handles one chunk of it. Lists that do not fit one table take several launches.
#pragma once

#include <vector>

#include "cuda/kernels/rows.cuh"

namespace vt::cuda {

/// A number an op was given: in host memory, or a 0-d tensor on the device that only kernels read.
struct Number {
  const char* data = nullptr;
  DType dtype = DType::Float64;
  double value = 0;

  Number() = default;
  explicit Number(double v) : value(v) {}
  /// An undefined tensor is `otherwise`.
  explicit Number(const Tensor& t, double otherwise = 0) : value(otherwise) {
    if (!t.defined()) return;
    if (t.device().is_cuda()) {
      data = static_cast<const char*>(t.data());
      dtype = t.dtype();
    } else {
      value = load_scalar(t.data(), t.dtype()).to_double();
    }
  }
  __device__ double get() const { return data ? load_as<double>(data, dtype) : value; }
};

inline constexpr int kTableTensors = 192;        // of one launch
inline constexpr int64_t kChunkElements = 8192;  // of one block
inline constexpr int kMultiThreads = 256;

template <int Lists>
struct TensorTable {
  int tensors = 0;
  char* data[Lists][kTableTensors];
  int64_t numel[kTableTensors];
  Number number[kTableTensors];  // one per tensor: its step count
  int32_t first_block[kTableTensors + 1];
  DType dtype[Lists][kTableTensors];
  bool aligned[kTableTensors];  // all of its pointers, to 16 bytes

  __device__ int find(int block) const {
    int low = 0, high = tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

/// Lists of tensors as dense elements: tensor i of every list in the same order of elements, itself
/// where all of them lie so, else contiguous copies that write_back() returns.
template <int Lists>
class DenseLists {
 public:
  /// An empty list stands for absent tensors. Bit l of `written` says that list l is an output.
  DenseLists(const std::array<TensorSpan, Lists>& lists, unsigned written)
      : original_(lists), written_(written) {
    for (size_t i = 0; i < lists[0].size(); ++i) {
      const Tensor& lead = lists[0][i];
      bool alike = lead.is_non_overlapping_and_dense();
      for (const TensorSpan& list : lists) {
        if (list.empty()) continue;
        check(equal(list[i].sizes(), lead.sizes()), "tensors of one position differ in shape: ",
              lead.sizes(), " and ", list[i].sizes());
        alike = alike && equal(list[i].strides(), lead.strides());
      }
      for (int l = 0; l < Lists; ++l) {
        if (!lists[l].empty())
          items_[l].push_back(alike ? lists[l][i] : contiguous(lists[l][i]));
      }
    }
  }
  const Tensor& at(int list, size_t i) const { return items_[list][i]; }
  bool has(int list) const { return !items_[list].empty(); }
  size_t size() const { return items_[0].size(); }
  void write_back() const {
    for (int l = 0; l < Lists; ++l) {
      if (!(written_ >> l & 1)) continue;
      for (size_t i = 0; i < items_[l].size(); ++i) {
        if (!items_[l][i].is_same(original_[l][i])) copy(original_[l][i], items_[l][i], true);
      }
    }
  }

 private:
  static bool equal(IntSpan a, IntSpan b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  std::array<TensorSpan, Lists> original_;
  std::array<std::vector<Tensor>, Lists> items_;
  unsigned written_;
};

/// How a tensor's elements are stored: all lists in one dtype, or mixed.
enum class Stored { Float, BFloat16, Half, Double, Mixed };

/// A list of `narrow` may be in 16 bits where the others are float.
template <int Lists>
Stored stored_as(const DenseLists<Lists>& lists, size_t i, unsigned narrow) {
  const auto is_narrow = [&](int l, DType dtype) {
    return (narrow >> l & 1) && (dtype == DType::BFloat16 || dtype == DType::Float16);
  };
  DType dtype = lists.at(0, i).dtype();
  if (dtype == DType::Float64) return Stored::Double;
  if (is_narrow(0, dtype)) dtype = DType::Float32;
  for (int l = 1; l < Lists; ++l) {
    if (!lists.has(l) || lists.at(l, i).dtype() == dtype) continue;
    if (dtype != DType::Float32 || !is_narrow(l, lists.at(l, i).dtype())) return Stored::Mixed;
  }
  return dtype == DType::Float32    ? Stored::Float
         : dtype == DType::BFloat16 ? Stored::BFloat16
         : dtype == DType::Float16  ? Stored::Half
                                    : Stored::Mixed;
}

/// Calls run(kind, table, blocks) for tables that together hold every non-empty tensor. `numbers`
/// (may be null): one a tensor. `narrow`: see stored_as.
template <int Lists, class Run>
void for_each_table(const DenseLists<Lists>& lists, const std::vector<Number>* numbers,
                    unsigned narrow, const Run& run) {
  for (const Stored kind :
       {Stored::Float, Stored::BFloat16, Stored::Half, Stored::Double, Stored::Mixed}) {
    TensorTable<Lists> table;
    int32_t blocks = 0;
    const auto flush = [&] {
      if (table.tensors > 0) {
        table.first_block[table.tensors] = blocks;
        run(kind, table, blocks);
      }
      table.tensors = 0;
      blocks = 0;
    };
    for (size_t i = 0; i < lists.size(); ++i) {
      const int64_t numel = lists.at(0, i).numel();
      if (numel == 0 || stored_as(lists, i, narrow) != kind) continue;
      const int64_t chunks = ceil_div(numel, kChunkElements);
      if (table.tensors == kTableTensors || blocks + chunks > std::numeric_limits<int32_t>::max())
        flush();
      const int k = table.tensors++;
      table.numel[k] = numel;
      table.first_block[k] = blocks;
      table.aligned[k] = true;
      if (numbers) table.number[k] = (*numbers)[i];
      for (int l = 0; l < Lists; ++l) {
        table.data[l][k] = nullptr;
        table.dtype[l][k] = DType::Float32;
        if (!lists.has(l)) continue;
        const Tensor& t = lists.at(l, i);
        table.data[l][k] = static_cast<char*>(t.data());
        table.dtype[l][k] = t.dtype();
        table.aligned[k] = table.aligned[k] && is_aligned(t.data());
      }
      blocks += static_cast<int32_t>(chunks);
    }
    flush();
  }
}

namespace detail {

/// Marks storage whose dtype is read from the table.
struct AnyStorage {};

__device__ inline int64_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::Bool:
    case DType::UInt8:
    case DType::Int8:
      return 1;
    case DType::Int16:
    case DType::Float16:
    case DType::BFloat16:
      return 2;
    case DType::Int64:
    case DType::Float64:
      return 8;
    default:
      return 4;
  }
}

/// W elements of a list that is stored as S, or if it may be `narrow` as its dtype says.
template <class S, class T, int W>
__device__ inline void load_list(const char* data, DType dtype, bool narrow, int64_t i,
                                 T (&values)[W]) {
  if constexpr (std::is_same_v<S, float>) {
    if (narrow && dtype == DType::BFloat16)
      return load_piece(reinterpret_cast<const __nv_bfloat16*>(data) + i, values);
    if (narrow && dtype == DType::Float16)
      return load_piece(reinterpret_cast<const __half*>(data) + i, values);
  }
  load_piece(reinterpret_cast<const S*>(data) + i, values);
}

/// f.prepare(number) gives a block's state, made by one thread, or skips all work when
/// f.skip(); f(state, values) then updates one element of every list. `f.reads` and `f.writes` are
/// bits of lists, F::kNarrow those that are read and may be in 16 bits.
template <class T, class S, int Lists, class F>
__global__ void __launch_bounds__(kMultiThreads)
    multi_tensor_kernel(const __grid_constant__ TensorTable<Lists> table, const F f) {
  __shared__ typename F::template State<T> shared;
  if (f.skip()) return;
  const int k = table.find(static_cast<int>(blockIdx.x));
  if (threadIdx.x == 0) shared = f.template prepare<T>(table.number[k]);
  __syncthreads();
  const auto state = shared;
  const int64_t begin = (blockIdx.x - table.first_block[k]) * kChunkElements;
  const int64_t n =
      table.numel[k] - begin < kChunkElements ? table.numel[k] - begin : kChunkElements;
  if constexpr (!std::is_same_v<S, AnyStorage>) {
    constexpr int W = kWidthOf<S>;
    if (table.aligned[k]) {
      const int64_t body = n / W * W;
      for (int64_t i = threadIdx.x * W; i < body; i += kMultiThreads * W) {
        T values[Lists][W];
#pragma unroll
        for (int l = 0; l < Lists; ++l) {
          if (f.reads >> l & 1)
            load_list<S>(table.data[l][k], table.dtype[l][k], F::kNarrow >> l & 1, begin + i,
                         values[l]);
        }
#pragma unroll
        for (int w = 0; w < W; ++w) {
          T one[Lists];
#pragma unroll
          for (int l = 0; l < Lists; ++l) one[l] = values[l][w];
          f(state, one);
#pragma unroll
          for (int l = 0; l < Lists; ++l) values[l][w] = one[l];
        }
#pragma unroll
        for (int l = 0; l < Lists; ++l) {
          if (f.writes >> l & 1)
            store_piece<S, T, W>(reinterpret_cast<S*>(table.data[l][k]) + begin + i, values[l]);
        }
      }
      const int64_t i = body + threadIdx.x;
      if (i < n) {
        T one[Lists];
#pragma unroll
        for (int l = 0; l < Lists; ++l) {
          T value[1];
          if (!(f.reads >> l & 1)) continue;
          load_list<S>(table.data[l][k], table.dtype[l][k], F::kNarrow >> l & 1, begin + i, value);
          one[l] = value[0];
        }
        f(state, one);
#pragma unroll
        for (int l = 0; l < Lists; ++l) {
          if (f.writes >> l & 1)
            reinterpret_cast<S*>(table.data[l][k])[begin + i] = convert<S>(one[l]);
        }
      }
      return;
    }
  }
  for (int64_t i = threadIdx.x; i < n; i += kMultiThreads) {
    T one[Lists];
#pragma unroll
    for (int l = 0; l < Lists; ++l) {
      const DType dtype = table.dtype[l][k];
      if (f.reads >> l & 1)
        one[l] = load_as<T>(table.data[l][k] + (begin + i) * item_bytes(dtype), dtype);
    }
    f(state, one);
#pragma unroll
    for (int l = 0; l < Lists; ++l) {
      const DType dtype = table.dtype[l][k];
      if (f.writes >> l & 1)
        store_as(table.data[l][k] + (begin + i) * item_bytes(dtype), dtype, one[l]);
    }
  }
}

}  // namespace detail

/// Applies a functor (see multi_tensor_kernel) to every element of the lists.
template <int Lists, class F>
void multi_tensor_apply(const Launch& launch, const DenseLists<Lists>& lists,
                        const std::vector<Number>* numbers, const F& f) {
  using namespace detail;
  for_each_table(lists, numbers, F::kNarrow,
                 [&](Stored kind, const TensorTable<Lists>& table, int32_t blocks) {
                   const auto kernel =
                       kind == Stored::Float      ? multi_tensor_kernel<float, float, Lists, F>
                       : kind == Stored::BFloat16 ? multi_tensor_kernel<float, __nv_bfloat16, Lists, F>
                       : kind == Stored::Double   ? multi_tensor_kernel<double, AnyStorage, Lists, F>
                                                  : multi_tensor_kernel<float, AnyStorage, Lists, F>;
                   launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMultiThreads), 0,
                          table, f);
                 });
}

}  // namespace vt::cuda
