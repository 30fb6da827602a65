// Switches of the process that kernels look at when they are called: how exact products are, and
// which libraries may do the work (torch.backends). They are one word, so that whoever keeps kernel
// calls (captured steps) can keep the switches of the moment with each, and compare all at once.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace vt {

enum class KernelSwitch : uint32_t {
  MatmulTf32 = 1 << 0,               // float32 products may round their inputs to TF32
  CudnnEnabled = 1 << 1,             // cuDNN may be used at all
  CudnnBenchmark = 1 << 2,           // convolutions measure their plans on first use
  CudnnDeterministic = 1 << 3,       // convolutions use deterministic plans only
  CudnnTf32 = 1 << 4,                // float32 convolutions may round their inputs to TF32
  CudnnAttention = 1 << 5,           // fused attention, where it applies and is faster
  CudnnSmallAttention = 1 << 6,      // also where it is not faster than our own
  DeterministicAlgorithms = 1 << 7,  // concerns convolutions and attention alike
};

/// All of them, a bit each, as kernels on the calling thread see them: those of the process, or
/// within KernelSwitchesAs those given there.
uint32_t kernel_switches();
inline bool kernel_switch(KernelSwitch which) {
  return (kernel_switches() & static_cast<uint32_t>(which)) != 0;
}
/// Sets one for the process, or within KernelSwitchesAs for the rest of that scope alone.
void set_kernel_switch(KernelSwitch which, bool on);
/// The names of those that are on.
std::vector<std::string> kernel_switches_on();
/// By name, as "cudnn_enabled". Throws ValueError for others.
KernelSwitch kernel_switch_named(std::string_view name);

/// Switches for the calls of this thread in a scope.
class KernelSwitchesAs {
 public:
  explicit KernelSwitchesAs(uint32_t all);
  ~KernelSwitchesAs();
  KernelSwitchesAs(const KernelSwitchesAs&) = delete;
  KernelSwitchesAs& operator=(const KernelSwitchesAs&) = delete;

 private:
  int64_t before_;
};

}  // namespace vt
