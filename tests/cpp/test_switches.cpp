// Switches that kernels look at: of the process, of a scope on a thread, and of recorded calls.
#include <cstdio>
#include <thread>

#include "core/error.h"
#include "core/kernel_switches.h"
#include "dispatch/kernels.h"
#include "graphs/program.h"

#include "check.h"

namespace {

using namespace vt;
using vt::test::failures;

constexpr auto kTf32 = KernelSwitch::MatmulTf32;
constexpr auto kBit = static_cast<uint32_t>(kTf32);

void of_the_process_and_of_a_scope() {
  const uint32_t start = kernel_switches();
  CHECK(kernel_switch(KernelSwitch::CudnnEnabled) && !kernel_switch(kTf32));
  set_kernel_switch(kTf32, true);
  CHECK(kernel_switches() == (start | kBit));
  std::thread([&] { CHECK(kernel_switch(kTf32)); }).join();
  {
    const KernelSwitchesAs none(0);
    CHECK(kernel_switches() == 0);
    {
      const KernelSwitchesAs inner(kBit);
      CHECK(kernel_switch(kTf32));
    }
    CHECK(!kernel_switch(kTf32));
    std::thread([&] { CHECK(kernel_switches() == (start | kBit)); }).join();
    set_kernel_switch(KernelSwitch::CudnnBenchmark, true);  // of this scope alone
    CHECK(kernel_switches() == static_cast<uint32_t>(KernelSwitch::CudnnBenchmark));
    std::thread([&] { CHECK(!kernel_switch(KernelSwitch::CudnnBenchmark)); }).join();
    set_kernel_switch(KernelSwitch::CudnnBenchmark, false);
    CHECK(kernel_switches() == 0);
  }
  CHECK(kernel_switches() == (start | kBit));
  set_kernel_switch(kTf32, false);
  CHECK(kernel_switches() == start);
  CHECK(kernel_switch_named("matmul_tf32") == kTf32);
  bool refused = false;
  try {
    kernel_switch_named("matmul");
  } catch (const Error& error) {
    refused = error.kind() == ErrorKind::Value;
  }
  CHECK(refused);
}

/// A kernel that shows what it saw.
void fill(const Tensor& self, const Tensor&) {
  *self.data_as<double>() = static_cast<double>(kernel_switches());
}

void of_recorded_calls() {
  kernels_for(DeviceType::CPU).fill_ = fill;
  const uint32_t start = kernel_switches();
  Tensor seen[] = {empty({}, DType::Float64), empty({}, DType::Float64)};
  auto program = make_ref<graphs::Program>();
  for (const Tensor& self : seen) {
    set_kernel_switch(kTf32, &self != seen);
    auto call = make_ref<graphs::Call>();
    call->id = OpId::fill_;
    call->args = {Tensor(), Tensor()};
    call->outputs = {0};
    const Tensor inputs[] = {self, self};
    program->add(*call, inputs, {&self, 1});
  }
  set_kernel_switch(kTf32, false);
  for (int run = 0; run < 2; ++run) {
    set_kernel_switch(KernelSwitch::CudnnBenchmark, run == 1);  // later changes reach none of them
    program->run();
    CHECK(*seen[0].data_as<double>() == start);
    CHECK(*seen[1].data_as<double>() == (start | kBit));
  }
  set_kernel_switch(KernelSwitch::CudnnBenchmark, false);
  program->run_op(1);
  CHECK(*seen[1].data_as<double>() == (start | kBit));
  CHECK(kernel_switches() == start);
}

}  // namespace

int main() {
  of_the_process_and_of_a_scope();
  of_recorded_calls();
  if (failures == 0) std::printf("test_switches: ok\n");
  return failures != 0;
}
