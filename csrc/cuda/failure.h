// What a kernel leaves behind when it finds data it cannot go on with, such as an index out of
// range. It cannot throw: it writes a record into page-locked host memory, which survives the
// context, and traps. The next call that the driver refuses then says what happened and in which
// op.
#pragma once

#include <cstdint>
#include <string>

namespace vt::cuda {

/// Ops whose kernels check what they read.
enum class FailedCheck : int {
  None,
  Index,
  IndexSelect,
  IndexAdd,
  IndexCopy,
  Gather,
  Scatter,
  ScatterAdd,
  ScatterReduce,
  Embedding,
  CrossEntropy,
  MaxPoolBackward,
  SearchSorted,
  Bernoulli,
  MultinomialWeight,
  MultinomialSum,
  MultinomialCategories,
  BinaryCrossEntropy,
};

struct FailureRecord {
  FailedCheck check = FailedCheck::None;  // written last
  // The offending index and how many there are; of probabilities the place and its bits (of
  // binary_cross_entropy the operand: 0 input, 1 target).
  int64_t index = 0, size = 0;
};

/// Where the kernels of a device write; in device memory, with the record on the host.
struct FailureSlot {
  FailureRecord* record;
  unsigned claimed;  // by the thread that writes
};

/// The slot of a device, made on its first call.
FailureSlot* failure_slot(int device);
/// The record behind a device's slot, for kernels that write it themselves.
FailureRecord* failure_record(int device);
/// One sentence on the check that failed; empty if none did. Reads host memory only.
std::string failed_check();

}  // namespace vt::cuda
