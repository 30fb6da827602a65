// Captured steps as CUDA graphs: the kernel calls of a program (graphs/program.h) are issued once,
// in order, on a stream of their own that is being captured, and replayed as one launch. No user
// code runs in between, and other threads and streams are not concerned.
//
// What a graph has in it must stay good while it lives, so:
// - Addresses. The program's tensors are held, and checked to be where they were at each launch.
//   What kernels allocate for themselves (workspaces, temporaries) comes from the graph's pool,
//   which nobody else allocates from; inside, memory is reused in the order of the graph.
// - Numbers. Those that change with every run (seed and offset of random numbers, learning rates,
//   step counts, inputs from the host) are read from the control block, device memory that one
//   copy from page-locked memory fills before each launch.
// - The graph itself. Dropped while a run is under way, it lives on in a list until an event after
//   its last launch has passed.
#pragma once

#include <cstddef>

namespace vt::cuda {

/// Registers the lowering of captured steps.
void install_lowering();
/// Destroys dropped graphs whose last run is done, so that their memory is free. Returns how many
/// are still running.
size_t collect_graphs();

}  // namespace vt::cuda
