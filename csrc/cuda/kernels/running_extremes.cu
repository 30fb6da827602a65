// cummax and cummin with the place of the extreme. nan is the largest and the smallest at once, and
// stays; of equal elements the last is named.
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/loops.cuh"
#include "cuda/kernels/scan.cuh"

namespace vt::cuda {
namespace {

template <class T>
struct Place {
  T value;
  int64_t index;  // negative: none yet
};

template <class T, bool kMax>
struct RunningExtreme {
  const char* in;
  char* values;
  int64_t* indices;
  DType dtype;
  int size;  // of an element

  using Acc = Place<T>;
  __device__ Acc start() const { return {T(0), -1}; }
  __device__ Acc load(int64_t position, int64_t index) const {
    return {load_as<T>(in + position * size, dtype), index};
  }
  __device__ Acc combine(const Acc& a, const Acc& b) const {
    if (b.index < 0) return a;
    if (a.index < 0 || b.value != b.value) return b;
    return a.value == a.value && (kMax ? b.value >= a.value : b.value <= a.value) ? b : a;
  }
  __device__ void store(int64_t position, const Acc& a) const {
    store_as<T>(values + position * size, dtype, a.value);
    indices[position] = a.index;
  }
};

template <bool kMax>
void running_extreme(const Tensor& values, const Tensor& indices, const Tensor& self, int64_t dim) {
  if (self.numel() == 0) return;
  const Tensor input = contiguous(self);
  const Launch launch(self.device());
  visit_compute(self.dtype(), [&]<class T>() {
    scan(launch,
         RunningExtreme<T, kMax>{static_cast<const char*>(input.data()),
                                 static_cast<char*>(values.data()), indices.data_as<int64_t>(),
                                 self.dtype(), static_cast<int>(self.itemsize())},
         scan_shape(self, dim));
  });
}

const RegisterCuda registered([](KernelTable& t) {
  t.cummax = running_extreme<true>;
  t.cummin = running_extreme<false>;
});

}  // namespace
}  // namespace vt::cuda
