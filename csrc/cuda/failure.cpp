#include "cuda/failure.h"

#include <array>
#include <atomic>
#include <bit>
#include <mutex>

#include "core/error.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

std::array<std::atomic<FailureSlot*>, kMaxDevices> slots{};
std::array<std::atomic<const FailureRecord*>, kMaxDevices> records{};

FailureSlot* make_slot(int device) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (FailureSlot* made = slots[device]) return made;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;  // others may be capturing
  FailureSlot filled{};
  void* slot = nullptr;
  void* record = nullptr;
  check_cuda(cudaHostAlloc(&record, sizeof(FailureRecord), cudaHostAllocPortable),
             "reserving memory for a kernel's failure");
  filled.record = new (record) FailureRecord;
  check_cuda(cudaMalloc(&slot, sizeof filled), "reserving memory for a kernel's failure");
  check_cuda(cudaMemcpy(slot, &filled, sizeof filled, cudaMemcpyHostToDevice),
             "reserving memory for a kernel's failure");
  records[device] = filled.record;
  slots[device] = static_cast<FailureSlot*>(slot);
  return slots[device];
}

const char* op_of(FailedCheck check) {
  switch (check) {
    case FailedCheck::Index:
      return "index";
    case FailedCheck::IndexSelect:
      return "index_select";
    case FailedCheck::IndexAdd:
      return "index_add_";
    case FailedCheck::IndexCopy:
      return "index_copy_";
    case FailedCheck::Gather:
      return "gather";
    case FailedCheck::Scatter:
      return "scatter_";
    case FailedCheck::ScatterAdd:
      return "scatter_add_";
    case FailedCheck::ScatterReduce:
      return "scatter_reduce";
    case FailedCheck::Embedding:
      return "embedding";
    case FailedCheck::MaxPoolBackward:
      return "max_pool2d_with_indices_backward";
    case FailedCheck::SearchSorted:
      return "searchsorted";
    default:
      return "cross_entropy";
  }
}

std::string describe(FailedCheck check, int64_t index, int64_t size) {
  switch (check) {
    case FailedCheck::CrossEntropy:
      return str("cross_entropy: Target ", index, " is out of bounds (", size, " classes)");
    case FailedCheck::SearchSorted:
      return str("searchsorted: sorter index ", index, " is out of bounds for a row of size ",
                 size);
    case FailedCheck::Bernoulli:
      return str("bernoulli: Expected p_in >= 0 && p_in <= 1 to be true, but got ",
                 std::bit_cast<double>(size), " at element ", index);
    case FailedCheck::MultinomialWeight:
      return str("multinomial: probability tensor contains either `inf`, `nan` or element < 0 (",
                 std::bit_cast<double>(size), " at element ", index, ")");
    case FailedCheck::MultinomialSum:
      return str(
          "multinomial: invalid multinomial distribution (sum of probabilities <= 0) in row ",
          index);
    case FailedCheck::MultinomialCategories:
      return str(
          "multinomial: invalid multinomial distribution (with replacement=False, not enough "
          "non-negative category to sample) in row ",
          index);
    default:
      return str(op_of(check), ": index ", index, " is out of bounds for a dimension of size ",
                 size);
  }
}

}  // namespace

FailureSlot* failure_slot(int device) {
  FailureSlot* slot = slots[device].load(std::memory_order_acquire);
  return slot ? slot : make_slot(device);
}

FailureRecord* failure_record(int device) {
  failure_slot(device);
  return const_cast<FailureRecord*>(records[device].load(std::memory_order_acquire));
}

std::string failed_check() {
  for (size_t device = 0; device < records.size(); ++device) {
    const volatile FailureRecord* record = records[device];
    if (!record || record->check == FailedCheck::None) continue;
    const int64_t index = record->index, size = record->size;
    const FailedCheck check = record->check;
    return describe(check, index, size) + str(" (on cuda:", device, ")");
  }
  return {};
}

}  // namespace vt::cuda
