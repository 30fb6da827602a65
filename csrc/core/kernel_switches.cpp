#include "core/kernel_switches.h"

#include <atomic>
#include <utility>

#include "core/error.h"

namespace vt {
namespace {

constexpr uint32_t bit(KernelSwitch which) { return static_cast<uint32_t>(which); }

std::atomic<uint32_t> of_the_process{bit(KernelSwitch::CudnnEnabled) |
                                     bit(KernelSwitch::CudnnTf32) |
                                     bit(KernelSwitch::CudnnAttention)};
thread_local constinit int64_t of_the_thread = -1;  // -1: those of the process

constexpr std::pair<std::string_view, KernelSwitch> kNames[] = {
    {"matmul_tf32", KernelSwitch::MatmulTf32},
    {"cudnn_enabled", KernelSwitch::CudnnEnabled},
    {"cudnn_benchmark", KernelSwitch::CudnnBenchmark},
    {"cudnn_deterministic", KernelSwitch::CudnnDeterministic},
    {"cudnn_tf32", KernelSwitch::CudnnTf32},
    {"cudnn_attention", KernelSwitch::CudnnAttention},
    {"cudnn_small_attention", KernelSwitch::CudnnSmallAttention},
    {"deterministic_algorithms", KernelSwitch::DeterministicAlgorithms},
};

}  // namespace

uint32_t kernel_switches() {
  return of_the_thread < 0 ? of_the_process.load(std::memory_order_relaxed)
                           : static_cast<uint32_t>(of_the_thread);
}

void set_kernel_switch(KernelSwitch which, bool on) {
  if (of_the_thread >= 0) {  // a function that is called as an op changes its own
    const int64_t rest = of_the_thread & ~int64_t{bit(which)};
    of_the_thread = on ? rest | bit(which) : rest;
  } else if (on) {
    of_the_process.fetch_or(bit(which), std::memory_order_relaxed);
  } else {
    of_the_process.fetch_and(~bit(which), std::memory_order_relaxed);
  }
}

std::vector<std::string> kernel_switches_on() {
  std::vector<std::string> names;
  for (const auto& [name, which] : kNames) {
    if (kernel_switch(which)) names.emplace_back(name);
  }
  return names;
}

KernelSwitch kernel_switch_named(std::string_view name) {
  for (const auto& [known, which] : kNames) {
    if (known == name) return which;
  }
  fail(ErrorKind::Value, "kernels have no switch '", name, "'");
}

KernelSwitchesAs::KernelSwitchesAs(uint32_t all) : before_(std::exchange(of_the_thread, all)) {}
KernelSwitchesAs::~KernelSwitchesAs() { of_the_thread = before_; }

}  // namespace vt
