// _to_dtype: a converted copy with the same layout.
#include "cpu/kernels/loops.h"

namespace vt::cpu::VT_ISA {
namespace {

void to_dtype(const Tensor& out, const Tensor& self, DType) {
  Tensor target = out;
  TensorIterator it;
  it.unary(target, self,
           {.promote = Promote::None,
            .output_dtype = self.dtype(),
            .op = "_to_dtype",
            .check_overlap = false,
            .check_output_cast = false});
  // Values pass as the source's compute type and are converted once, on store.
  visit_all(self.dtype(), [&]<class T>() { map_kernel(it, [](T x) -> T { return x; }); });
}

const RegisterCpu registered([](KernelTable& t) { t._to_dtype = to_dtype; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
