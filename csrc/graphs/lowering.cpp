#include "graphs/lowering.h"

#include "core/device_backend.h"

namespace vt::graphs {
namespace {

Lowering* lowerings[kNumDeviceTypes] = {};

}  // namespace

void set_lowering(DeviceType type, Lowering* lowering) {
  lowerings[static_cast<int>(type)] = lowering;
}

Lowering& lowering_for(DeviceType type) {
  backend_for(type);  // loads its library
  Lowering* lowering = lowerings[static_cast<int>(type)];
  check(lowering != nullptr, "captured steps on ", Device{type, 0},
        " run op by op: the backend has no graphs");
  return *lowering;
}

}  // namespace vt::graphs
