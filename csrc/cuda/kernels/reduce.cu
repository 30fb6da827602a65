// sum, mean, prod, any, all, count_nonzero. Floats add up in float (double for double), in many
// short chains that are merged as a tree; integers in int64.
#include "cuda/kernels/column_sums.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/preload.h"

VT_LOAD_EARLY

namespace vt::cuda {
namespace {

/// Writes accumulators, scaled where they are floats.
template <class T>
__device__ void store_scaled(const ReduceOutput& out, int64_t position, T acc) {
  char* p = out.data + position * out.size;
  if constexpr (std::is_floating_point_v<T>)
    store_as<double>(p, out.dtype, static_cast<double>(acc) * out.scale);
  else
    store_as<int64_t>(p, out.dtype, acc);
}

template <class T>
struct Sum {
  using Acc = T;
  __device__ Acc start() const { return 0; }
  __device__ void step(Acc& a, T x, int64_t) const { a += x; }
  __device__ void merge(Acc& a, const Acc& b) const { a += b; }
  __device__ void store(const ReduceOutput& out, int64_t position, const Acc& a) const {
    store_scaled(out, position, a);
  }
};

template <class T>
struct Product {
  using Acc = T;
  __device__ Acc start() const { return 1; }
  __device__ void step(Acc& a, T x, int64_t) const { a *= x; }
  __device__ void merge(Acc& a, const Acc& b) const { a *= b; }
  __device__ void store(const ReduceOutput& out, int64_t position, const Acc& a) const {
    store_scaled(out, position, a);
  }
};

/// How many elements are not zero, and the questions that number answers.
struct Count {
  enum Question : int { HowMany, Any, All };
  Question question;
  int64_t total;

  using Acc = int64_t;
  __device__ Acc start() const { return 0; }
  __device__ void step(Acc& a, bool x, int64_t) const { a += x; }
  __device__ void merge(Acc& a, const Acc& b) const { a += b; }
  __device__ void store(const ReduceOutput& out, int64_t position, const Acc& a) const {
    store_as<int64_t>(out.data + position * out.size, out.dtype,
                      question == HowMany ? a
                      : question == Any   ? int64_t{a > 0}
                                          : int64_t{a == total});
  }
};

ReduceOutput output(const Tensor& out, double scale = 1) {
  return {static_cast<char*>(out.data()), out.dtype(), static_cast<int>(out.itemsize()), scale,
          nullptr};
}

int64_t count_of(const Tensor& self, uint64_t mask) {
  int64_t n = 1;
  for (int64_t d = 0; d < self.dim(); ++d) n *= (mask >> d & 1) ? self.sizes()[d] : 1;
  return n;
}

void count(const Tensor& out, const Tensor& self, uint64_t mask, Count::Question question) {
  const Count op{question, count_of(self, mask)};
  if (self.dtype() == DType::Bool || self.dtype() == DType::UInt8)
    reduce(self, mask, StoredFlag{}, op, output(out));
  else
    reduce(self, mask, Converted<bool>{self.dtype()}, op, output(out));
}

/// `self` as the dtype the sum is asked in, where reading it as the accumulator's type would not
/// give the same.
Tensor as_summand(const Tensor& self, std::optional<DType> dtype) {
  if (!dtype || *dtype == self.dtype()) return self;
  const bool reads_the_same = is_floating(*dtype)
                                  ? !is_reduced_float(*dtype)
                                  : is_integral(*dtype) && !is_floating(self.dtype());
  if (reads_the_same) return self;
  const Tensor converted = empty(self.sizes(), *dtype, self.device());
  copy(converted, self, true);
  return converted;
}

/// The type to accumulate in: of the wider of what is read and what is asked for.
template <class F>
void visit_accumulator(const Tensor& self, std::optional<DType> dtype, F&& f) {
  const DType asked = dtype.value_or(self.dtype());
  if (self.dtype() == DType::Float64 || asked == DType::Float64)
    f.template operator()<double>();
  else if (is_floating(self.dtype()) || is_floating(asked))
    f.template operator()<float>();
  else
    f.template operator()<int64_t>();
}

/// A sum over the rows of one large matrix, such as a bias' gradient; false for anything else.
bool sum_of_rows(const Tensor& out, const Tensor& self, uint64_t mask, double scale) {
  ReduceGeometry g;
  const int64_t size = self.itemsize();
  if (size > 4 || self.numel() < int64_t{1} << 16 || !detail::plan(g, self, mask, true))
    return false;
  if (g.kept.ndim != 1 || g.kept.stride[0][0] != size || g.reduced.ndim != 1 ||
      g.reduced.stride[0][0] < g.kept.numel * size || g.reduced.numel < 64)
    return false;
  column_sums(Launch(self.device()), {.out = Elements(out),
                                      .data = Elements(self),
                                      .rows = g.reduced.numel,
                                      .n = g.kept.numel,
                                      .stride = g.reduced.stride[0][0] / size,
                                      .scale = static_cast<float>(scale)});
  return true;
}

void sum(const Tensor& out, const Tensor& self, uint64_t mask, std::optional<DType> dtype,
         double scale) {
  if (self.dtype() == DType::Bool && (!dtype || is_integral(*dtype)))
    return count(out, self, mask, Count::HowMany);
  const Tensor input = as_summand(self, dtype);
  const ReduceOutput to = output(out, scale);
  visit_accumulator(input, dtype, [&]<class T>() {
    const DType from = input.dtype();
    if (std::is_same_v<T, float> && is_floating(from) && sum_of_rows(out, input, mask, scale)) return;
    if (from == DTypeOf<T>::value) return reduce(input, mask, Stored<T>{}, Sum<T>{}, to);
    if constexpr (std::is_same_v<T, float>) {
      if (from == DType::BFloat16)
        return reduce(input, mask, Stored<__nv_bfloat16>{}, Sum<T>{}, to);
      if (from == DType::Float16) return reduce(input, mask, Stored<__half>{}, Sum<T>{}, to);
    }
    reduce(input, mask, Converted<T>{from}, Sum<T>{}, to);
  });
}

/// The sums over the rows of each matrix, each in parts.
void row_parts(const Tensor& out, const Tensor& self, int64_t parts) {
  if (out.numel() == 0) return;
  const Launch launch(self.device());
  const int64_t batch = self.dim() == 3 ? self.sizes()[0] : 1;
  const int64_t rows = self.sizes()[self.dim() - 2], n = self.sizes().back();
  const int64_t batch_stride = self.dim() == 3 ? self.strides()[0] : 0;
  const int64_t stride = self.strides()[self.dim() - 2];
  constexpr int64_t kMostOfGrid = 65535;
  if (self.itemsize() <= 4 && (n == 1 || self.strides().back() == 1) && batch <= kMostOfGrid &&
      parts <= kMostOfGrid) {
    const ColumnSums sums{.out = {}, .data = Elements(self), .rows = rows, .n = n,
                          .stride = stride, .scale = 1};
    return column_sums_in_parts(launch, sums, out.data_as<float>(), parts, batch, batch_stride);
  }
  // The first part is all of the sum.
  clear_rows(make_view(out, Dims{batch * parts, n}, Dims{n, 1}, out.storage_offset()), 0, launch);
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor to = make_view(out, Dims{n}, Dims{1}, out.storage_offset() + b * parts * n);
    const Tensor from = make_view(self, Dims{rows, n}, Dims{stride, self.strides().back()},
                                  self.storage_offset() + b * batch_stride);
    sum(to, from, 0b01, out.dtype(), 1);
  }
}

void product(const Tensor& out, const Tensor& self, uint64_t mask, std::optional<DType> dtype) {
  const Tensor input = as_summand(self, dtype);
  visit_accumulator(input, dtype, [&]<class T>() {
    reduce(input, mask, Converted<T>{input.dtype()}, Product<T>{}, output(out));
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.sum_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool,
                 std::optional<DType> dtype) {
    sum(out, self, dim_mask(dim, self.dim()), dtype, 1);
  };
  t._row_parts = row_parts;
  t.mean_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool,
                  std::optional<DType> dtype) {
    const uint64_t mask = dim_mask(dim, self.dim());
    sum(out, self, mask, out.dtype() == self.dtype() ? dtype : out.dtype(),
        1.0 / static_cast<double>(count_of(self, mask)));
  };
  t.prod = [](const Tensor& out, const Tensor& self, std::optional<DType> dtype) {
    product(out, self, dim_mask(std::nullopt, self.dim()), dtype);
  };
  t.prod_dim = [](const Tensor& out, const Tensor& self, int64_t dim, bool,
                  std::optional<DType> dtype) {
    product(out, self, dim_mask(dim, self.dim()), dtype);
  };
  t.any_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool) {
    count(out, self, tested_mask(dim, self.dim()), Count::Any);
  };
  t.all_dim = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim, bool) {
    count(out, self, tested_mask(dim, self.dim()), Count::All);
  };
  t.count_nonzero = [](const Tensor& out, const Tensor& self, std::optional<IntSpan> dim) {
    count(out, self, dim_mask(dim, self.dim()), Count::HowMany);
  };
});

}  // namespace
}  // namespace vt::cuda
