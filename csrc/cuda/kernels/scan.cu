// cumsum and cumprod. Floats are carried in double, as on the CPU: scans wait for memory, not for
// arithmetic.
#include "cuda/kernels/copy.cuh"
#include "cuda/kernels/scan.cuh"

namespace vt::cuda {
namespace {

template <class S, bool kProduct>
struct Running {
  const S* in;
  S* out;

  using Acc = std::conditional_t<std::is_integral_v<S>, int64_t, double>;
  __device__ Acc start() const { return kProduct ? 1 : 0; }
  __device__ Acc load(int64_t position, int64_t) const { return convert<Acc>(in[position]); }
  __device__ Acc combine(const Acc& a, const Acc& b) const { return kProduct ? a * b : a + b; }
  __device__ void store(int64_t position, const Acc& a) const { out[position] = convert<S>(a); }
};

/// `t` dense and of the given dtype.
Tensor dense(const Tensor& t, DType dtype) {
  if (t.dtype() == dtype) return contiguous(t);
  const Tensor out = empty(t.sizes(), dtype, t.device());
  copy(out, t, true);
  return out;
}

template <bool kProduct>
void running(const Tensor& out, const Tensor& self, int64_t dim, std::optional<DType>) {
  if (self.numel() == 0) return;
  Tensor input = dense(self, out.dtype()), result = out;
  if (!is_floating(out.dtype()) && out.dtype() != DType::Int64) {  // in 64 bits, then narrowed
    input = dense(input, DType::Int64);
    result = empty(out.sizes(), DType::Int64, out.device());
  }
  const Launch launch(out.device());
  const ScanShape shape = scan_shape(self, dim);
  const auto run = [&]<class S>() {
    scan(launch,
         Running<S, kProduct>{static_cast<const S*>(input.data()), static_cast<S*>(result.data())},
         shape);
  };
  if (is_floating(out.dtype()))
    visit_float_storage(out.dtype(), run);
  else
    run.template operator()<int64_t>();
  if (!result.is_same(out)) copy(out, result, true);
}

const RegisterCuda registered([](KernelTable& t) {
  t.cumsum = running<false>;
  t.cumprod = running<true>;
});

}  // namespace
}  // namespace vt::cuda
