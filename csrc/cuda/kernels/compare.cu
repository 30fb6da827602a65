// Comparisons, logic and bits of two tensors. Comparisons and logic take their rule as a small
// table, so that one kernel serves them all.
#include "cuda/kernels/loops.cuh"

namespace vt::cuda {
namespace {

enum Relation : uint8_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };

/// Whether the relation of a to b is one of `accepted`.
struct Compare {
  uint8_t accepted;
  template <class T>
  __device__ bool operator()(T a, T b) const {
    const int relation = a < b ? kLess : a == b ? kEqual : a > b ? kGreater : kUnordered;
    return (accepted & relation) != 0;
  }
};

/// Bit 2a + b of `truth` is the result for the truth values a and b.
struct Logic {
  uint8_t truth;
  template <class T>
  __device__ bool operator()(T a, T b) const {
    return truth >> (2 * (a != T(0)) + (b != T(0))) & 1;
  }
};

struct BitAnd {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct BitOr {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct BitXor {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};

// Shifts past the width of the dtype give 0, or the sign.
struct ShiftLeft {
  int64_t width;
  __device__ int64_t operator()(int64_t a, int64_t b) const {
    return b < 0 || b >= width ? 0 : static_cast<int64_t>(static_cast<uint64_t>(a) << b);
  }
};
struct ShiftRight {
  int64_t width;
  __device__ int64_t operator()(int64_t a, int64_t b) const {
    return b < 0 || b >= width ? (a < 0 ? -1 : 0) : a >> b;
  }
};

template <class F>
void map_test(TensorIterator& it, const F& f) {
  visit_compute(it.common_dtype(), [&]<class T>() { map_kernel<T, bool, 2>(it, f); });
}
template <class F>
void map_bits(TensorIterator& it, const F& f) {
  if (it.common_dtype() == DType::Bool) {
    map_kernel<bool, bool, 2>(it, f);
    return;
  }
  visit_compute_integral(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, f); });
}
template <class F>
void map_shift(TensorIterator& it) {
  const int64_t width = item_size(it.common_dtype()) * 8;
  visit_compute_integral(it.common_dtype(), [&]<class T>() { map_kernel<T, T, 2>(it, F{width}); });
}

const RegisterCuda registered([](KernelTable& t) {
  t.eq = [](TensorIterator& it) { map_test(it, Compare{kEqual}); };
  t.ne = [](TensorIterator& it) { map_test(it, Compare{kLess | kGreater | kUnordered}); };
  t.lt = [](TensorIterator& it) { map_test(it, Compare{kLess}); };
  t.le = [](TensorIterator& it) { map_test(it, Compare{kLess | kEqual}); };
  t.gt = [](TensorIterator& it) { map_test(it, Compare{kGreater}); };
  t.ge = [](TensorIterator& it) { map_test(it, Compare{kGreater | kEqual}); };
  t.logical_and = [](TensorIterator& it) { map_test(it, Logic{0b1000}); };
  t.logical_or = [](TensorIterator& it) { map_test(it, Logic{0b1110}); };
  t.logical_xor = [](TensorIterator& it) { map_test(it, Logic{0b0110}); };
  t.bitwise_and = [](TensorIterator& it) { map_bits(it, BitAnd{}); };
  t.bitwise_or = [](TensorIterator& it) { map_bits(it, BitOr{}); };
  t.bitwise_xor = [](TensorIterator& it) { map_bits(it, BitXor{}); };
  t.bitwise_left_shift = [](TensorIterator& it) { map_shift<ShiftLeft>(it); };
  t.bitwise_right_shift = [](TensorIterator& it) { map_shift<ShiftRight>(it); };
});

}  // namespace
}  // namespace vt::cuda
