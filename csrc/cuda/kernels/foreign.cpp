// _foreign on a GPU: a function of the program's own, which launches kernels on the current stream.
// While a captured step is lowered that is the stream that is captured, and what the function
// allocates comes from the step's pool.
#include "core/foreign.h"

#include "cuda/kernels/launch.cuh"
#include "dispatch/kernels.h"

namespace vt::cuda {
namespace {

void foreign(TensorSpan writes, TensorSpan reads, const Ref<ForeignFunction>& function) {
  function->call(writes, reads);
}

const RegisterCuda registered([](KernelTable& t) { t._foreign = foreign; });

}  // namespace
}  // namespace vt::cuda
