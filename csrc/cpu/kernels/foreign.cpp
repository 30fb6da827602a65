// _foreign: a function of the program's own, with the elements in host memory.
#include "core/foreign.h"

#include "dispatch/kernels.h"

namespace vt::cpu::VT_ISA {
namespace {

void foreign(TensorSpan writes, TensorSpan reads, const Ref<ForeignFunction>& function) {
  function->call(writes, reads);
}

const RegisterCpu registered([](KernelTable& t) { t._foreign = foreign; });

}  // namespace
}  // namespace vt::cpu::VT_ISA
