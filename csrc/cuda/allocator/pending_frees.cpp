#include "cuda/allocator/pending_frees.h"

#include <algorithm>

namespace vt::cuda {
namespace {

ApiStatus not_ready() { return {ApiCode::NotReady, 0, "the work before the event still runs"}; }

}  // namespace

void PendingFrees::add(Block* block) {
  try {
    for (const StreamUse& use : block->uses) {
      Queue* queue = nullptr;
      for (Queue& candidate : queues_) {
        if (candidate.stream == use.stream && candidate.device == use.device) queue = &candidate;
      }
      if (!queue) queue = &queues_.emplace_back(Queue{use.device, use.stream, {}});
      queue->entries.push_back({nullptr, use.capture, block, last_number_ + 1});
    }
  } catch (...) {
    for (Queue& queue : queues_) {
      while (!queue.entries.empty() && queue.entries.back().block == block) {
        queue.entries.pop_back();
      }
    }
    throw;
  }
  for (Queue& queue : queues_) {
    for (size_t i = queue.entries.size(); i-- > 0 && queue.entries[i].block == block;) {
      record(queue.entries[i], *queue.device, queue.stream);
    }
  }
  ++last_number_;
  block->outstanding = static_cast<uint32_t>(block->uses.size());
  ++waiting_;
}

void PendingFrees::record(Entry& entry, DeviceApi& device, StreamHandle stream) noexcept {
  uint64_t capture = 0;
  if (!device.capture_id(stream, &capture).ok()) return;
  if (capture != entry.capture) {
    if (capture != 0) return;  // an event of this capture would not stand for the use
    entry.capture = 0;         // the use's capture is over
  }
  EventHandle event = nullptr;
  // While somebody waits, a spare event may be the one that is waited for.
  const auto spare = std::find_if(events_.rbegin(), events_.rend(), [&](const SpareEvent& e) {
    return waits_ == 0 && e.device == &device;
  });
  if (spare != events_.rend()) {
    event = spare->event;
    *spare = events_.back();
    events_.pop_back();
  } else if (!device.create_event(&event).ok()) {
    return;
  }
  if (device.record_event(event, stream).ok()) {
    entry.event = event;
  } else {
    keep_event(device, event);
  }
}

bool PendingFrees::order_after(StreamHandle waiter, const StreamUse& use) noexcept {
  uint64_t capture = 0;
  if (!device_.capture_id(waiter, &capture).ok() || capture != use.capture) return false;
  Entry entry{nullptr, use.capture, nullptr, 0};
  record(entry, *use.device, use.stream);
  if (!entry.event) return false;
  const bool ordered = entry.capture == capture && device_.wait_event(waiter, entry.event).ok();
  keep_event(*use.device, entry.event);
  return ordered;
}

void PendingFrees::keep_event(DeviceApi& device, EventHandle event) noexcept {
  try {
    events_.push_back({&device, event});
  } catch (const std::bad_alloc&) {
    if (waits_ == 0) device.destroy_event(event);
  }
}

ApiStatus PendingFrees::resolve(Queue& queue, const StreamHandle* own, uint64_t own_capture) {
  Entry& entry = queue.entries.front();
  DeviceApi& device = *queue.device;
  if (entry.capture == 0 && entry.number <= queue.passed) return {};
  if (!entry.event) {
    // Recorded later than the free, the event stands for more work than it must: safe.
    record(entry, device, queue.stream);
    if (!entry.event) {
      uint64_t capture = 0;
      const ApiStatus status = device.capture_id(queue.stream, &capture);
      return status.ok() ? not_ready() : status;
    }
  }
  if (entry.capture != 0) {
    uint64_t now = 0;
    const ApiStatus status = device.capture_id(queue.stream, &now);
    if (!status.ok()) return status;
    if (now != entry.capture) return {};  // that capture is over; its work runs in replays
    if (own_capture == entry.capture) return device_.wait_event(*own, entry.event);
    return not_ready();
  }
  if (own_capture != 0) return not_ready();
  return device.query_event(entry.event);
}

std::vector<PendingFrees::Wait> PendingFrees::begin_wait(const StreamHandle* own) {
  std::vector<Wait> waits;
  uint64_t capture = 0;
  // Eager work cannot be waited for in the own stream's capture.
  if (empty() || (own && (!device_.capture_id(*own, &capture).gone() || capture != 0)))
    return waits;
  waits.reserve(queues_.size());
  ++waits_;
  for (const Queue& queue : queues_) {
    Wait wait{queue.device, queue.stream, nullptr, 0};
    bool all_have_events = true;
    for (const Entry& entry : queue.entries) {
      if (entry.capture != 0 || entry.number <= queue.passed) continue;
      wait.up_to = entry.number;
      wait.event = entry.event;  // the last stands for those before it
      all_have_events = all_have_events && entry.event;
    }
    if (wait.up_to == 0) continue;
    if (!all_have_events) {
      wait.event = nullptr;
      if (!queue.device->capture_id(queue.stream, &capture).gone() || capture != 0) continue;
    }
    waits.push_back(wait);
  }
  if (waits.empty()) --waits_;
  return waits;
}

void PendingFrees::wait(std::vector<Wait>& waits) noexcept {
  for (Wait& w : waits) {
    const ApiStatus status =
        w.event ? w.device->synchronize_event(w.event) : w.device->synchronize_stream(w.stream);
    w.over = status.gone();
  }
}

void PendingFrees::end_wait(const std::vector<Wait>& waits) noexcept {
  --waits_;
  for (const Wait& w : waits) {
    for (Queue& queue : queues_) {
      if (w.over && queue.stream == w.stream && queue.device == w.device)
        queue.passed = std::max(queue.passed, w.up_to);
    }
  }
}

ApiStatus PendingFrees::process(const StreamHandle* own, std::vector<Block*>& done) {
  if (empty()) return {};
  uint64_t own_capture = 0;
  ApiStatus result;
  if (own) result = device_.capture_id(*own, &own_capture);
  if (!result.ok()) return result;
  for (Queue& queue : queues_) {
    while (!queue.entries.empty()) {
      const ApiStatus status = resolve(queue, own, own_capture);
      if (status.code == ApiCode::NotReady) break;
      if (!status.gone()) {
        result = status;
        break;
      }
      const Entry entry = queue.entries.front();
      queue.entries.pop_front();
      if (entry.event) keep_event(*queue.device, entry.event);
      if (--entry.block->outstanding == 0) {
        --waiting_;
        done.push_back(entry.block);  // the caller reserved room
      }
    }
  }
  return result;
}

void PendingFrees::destroy_events() noexcept {
  if (waits_ != 0) return;
  std::erase_if(events_,
                [](const SpareEvent& e) { return e.device->destroy_event(e.event).gone(); });
}

}  // namespace vt::cuda
