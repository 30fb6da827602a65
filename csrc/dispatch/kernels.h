// Kernel registration: each kernel file names its functions once; no central list to edit.
#pragma once

#include "vt/kernel_table.h"  // generated: struct KernelTable, one typed function pointer an op

namespace vt {

/// The kernels of a device type; entries a backend lacks are null.
KernelTable& kernels_for(DeviceType type);

/// A static object of this type in a kernel file adds that file's kernels when its library loads:
///   const RegisterCpu register_unary([](KernelTable& t) { t.exp = exp_kernel; });
template <DeviceType kType>
struct RegisterKernels {
  explicit RegisterKernels(void (*fill)(KernelTable&)) { fill(kernels_for(kType)); }
};
using RegisterCpu = RegisterKernels<DeviceType::CPU>;

}  // namespace vt
