// amax, amin, max, min, argmax, argmin. nan wins over every number; of equal elements the first.
#include <limits>

#include "cuda/kernels/reduce.cuh"

namespace vt::cuda {
namespace {

/// What every number is at least as extreme as.
template <class T, bool kMax>
__host__ __device__ constexpr T least_extreme() {
  using Limits = std::numeric_limits<T>;
  if constexpr (std::is_floating_point_v<T>)
    return kMax ? -Limits::infinity() : Limits::infinity();
  else
    return kMax ? Limits::lowest() : Limits::max();
}

template <class T, bool kMax>
struct Extremum {
  using Acc = T;
  __device__ Acc start() const { return least_extreme<T, kMax>(); }
  __device__ void step(Acc& a, T x, int64_t) const {
    a = a == a && !(kMax ? x <= a : x >= a) ? x : a;
  }
  __device__ void merge(Acc& a, const Acc& b) const { step(a, b, 0); }
  __device__ void store(const ReduceOutput& out, int64_t position, const Acc& a) const {
    store_as<T>(out.data + position * out.size, out.dtype, a);
  }
};

template <class T>
struct Place {
  T value;
  int64_t index;
};

/// A total order of (value, index), so that merging in any order finds the same element.
template <class T, bool kMax>
struct FirstExtremum {
  using Acc = Place<T>;
  __device__ Acc start() const {
    return {least_extreme<T, kMax>(), std::numeric_limits<int64_t>::max()};
  }
  __device__ void step(Acc& a, T x, int64_t index) const { merge(a, {x, index}); }
  __device__ void merge(Acc& a, const Acc& b) const {
    const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
    const bool wins = !nan_a && (nan_b || (kMax ? b.value > a.value : b.value < a.value));
    const bool ties = (nan_a && nan_b) || a.value == b.value;
    if (wins || (ties && b.index < a.index)) a = b;
  }
  __device__ void store(const ReduceOutput& out, int64_t position, const Acc& a) const {
    if (out.data) store_as<T>(out.data + position * out.size, out.dtype, a.value);
    out.indices[position] = a.index;
  }
};

/// Values and their places; either may be missing.
ReduceOutput output(const Tensor* values, const Tensor* indices) {
  ReduceOutput out{nullptr, DType::Bool, 1, 1, nullptr};
  if (values)
    out = {static_cast<char*>(values->data()), values->dtype(),
           static_cast<int>(values->itemsize()), 1, nullptr};
  if (indices) out.indices = indices->data_as<int64_t>();
  return out;
}

template <template <class, bool> class Op, bool kMax>
void extremum(const Tensor& self, uint64_t mask, const ReduceOutput& out, bool any_order) {
  const DType dtype = self.dtype();
  if (dtype == DType::Float32)
    reduce(self, mask, Stored<float>{}, Op<float, kMax>{}, out, any_order);
  else if (dtype == DType::BFloat16)
    reduce(self, mask, Stored<__nv_bfloat16>{}, Op<float, kMax>{}, out, any_order);
  else if (dtype == DType::Float16)
    reduce(self, mask, Converted<float>{dtype}, Op<float, kMax>{}, out, any_order);
  else if (dtype == DType::Float64)
    reduce(self, mask, Converted<double>{dtype}, Op<double, kMax>{}, out, any_order);
  else
    reduce(self, mask, Converted<int64_t>{dtype}, Op<int64_t, kMax>{}, out, any_order);
}

template <bool kMax>
void amax(const Tensor& out, const Tensor& self, IntSpan dim, bool) {
  extremum<Extremum, kMax>(self, dim_mask(dim, self.dim()), output(&out, nullptr), true);
}

template <bool kMax>
void max_dim(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim, bool) {
  extremum<FirstExtremum, kMax>(self, dim_mask(dim, self.dim()), output(&values, &indices), false);
}

template <bool kMax>
void argmax(const Tensor& out, const Tensor& self, std::optional<int64_t> dim, bool) {
  const uint64_t mask = dim ? dim_mask(*dim, self.dim()) : dim_mask(std::nullopt, self.dim());
  extremum<FirstExtremum, kMax>(self, mask, output(nullptr, &out), false);
}

const RegisterCuda registered([](KernelTable& t) {
  t.amax = amax<true>;
  t.amin = amax<false>;
  t.max_dim = max_dim<true>;
  t.min_dim = max_dim<false>;
  t.argmax = argmax<true>;
  t.argmin = argmax<false>;
});

}  // namespace
}  // namespace vt::cuda
