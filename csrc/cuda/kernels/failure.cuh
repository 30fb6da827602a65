// Stopping a kernel whose data is wrong, with a record for the host (cuda/failure.h).
#pragma once

#include "cuda/failure.h"

namespace vt::cuda {

/// Never returns. The first thread to come writes the record; the others give it time to.
__device__ __noinline__ inline void stop_kernel(FailureSlot* slot, FailedCheck check, int64_t index,
                                                int64_t size) {
  if (atomicCAS(&slot->claimed, 0u, 1u) == 0) {
    volatile FailureRecord* record = slot->record;
    record->index = index;
    record->size = size;
    __threadfence_system();
    record->check = check;
    __threadfence_system();
    atomicExch(&slot->claimed, 2u);
  }
  for (int wait = 0; wait < 10000 && atomicAdd(&slot->claimed, 0u) != 2; ++wait) __nanosleep(100);
  __trap();
}

}  // namespace vt::cuda
