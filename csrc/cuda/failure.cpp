#include "cuda/failure.h"

#include <array>
#include <atomic>
#include <bit>
#include <memory>
#include <mutex>

#include "core/error.h"
#include "core/host_wait.h"
#include "cuda/device.h"
#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace vt::cuda {
namespace {

std::array<std::atomic<FailureSlot*>, kMaxDevices> slots{};
std::array<std::atomic<const FailureRecord*>, kMaxDevices> records{};

FailureSlot* make_slot(int device) {
  const HostWait waiting;  // this may start the device
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (FailureSlot* made = slots[device]) return made;
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;  // others may be capturing
  constexpr const char* kWhat = "reserving memory for a kernel's failure";
  FailureSlot filled{};
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(FailureRecord), cudaHostAllocPortable), kWhat);
  std::unique_ptr<FailureRecord, decltype(&cudaFreeHost)> record(new (memory) FailureRecord,
                                                                 &cudaFreeHost);
  filled.record = record.get();
  check_cuda(cudaMalloc(&memory, sizeof filled), kWhat);
  std::unique_ptr<FailureSlot, decltype(&cudaFree)> slot(static_cast<FailureSlot*>(memory),
                                                         &cudaFree);
  check_cuda(cudaMemcpy(slot.get(), &filled, sizeof filled, cudaMemcpyHostToDevice), kWhat);
  records[device] = record.release();
  return slots[device] = slot.release();
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
    case FailedCheck::BinaryCrossEntropy:
      return str("binary_cross_entropy: all elements of ", index == 0 ? "input" : "target",
                 " should be between 0 and 1, but got ", std::bit_cast<double>(size));
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
