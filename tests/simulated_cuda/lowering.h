// How the simulated device takes over captured steps.
#pragma once

namespace vt::simulated {

void install_lowering();

}  // namespace vt::simulated
