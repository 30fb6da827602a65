#include "cuda/allocator/staging_ring.h"

namespace vt::cuda {
namespace {

// Two slots keep host and device busy at once; small ones are many, so that the host of a step of
// a few microseconds may run ahead.
constexpr size_t kFew = 2, kMany = 8, kSmall = size_t{16} << 10;
constexpr size_t kPitch = 256;

}  // namespace

StagingRing::StagingRing(DeviceApi& device, PinnedAllocator& memory, size_t nbytes)
    : device_(device), pitch_(align_up(nbytes, kPitch)) {
  const size_t slots = nbytes <= kSmall ? kMany : kFew;
  for (size_t i = 0; i < slots; ++i) events_.push_back(std::make_shared<DeviceEvent>(device));
  memory_ = memory.allocate(slots * pitch_);
}

StagingRing::~StagingRing() {
  if (memory_.release) memory_.release(memory_.context, memory_.data, memory_.nbytes);
}

std::byte* StagingRing::current() {
  events_[at_]->wait();
  return static_cast<std::byte*>(memory_.data) + at_ * pitch_;
}

void StagingRing::sent(StreamHandle stream) {
  try {
    events_[at_]->record(stream);
  } catch (...) {
    // Or the next user of the slot would overtake the work.
    device_.synchronize_stream(stream);
    at_ = (at_ + 1) % events_.size();
    throw;
  }
  last_ = events_[at_];
  at_ = (at_ + 1) % events_.size();
}

void StagingRing::extend(StreamHandle stream) {
  if (last_) last_->record(stream);
}

}  // namespace vt::cuda
