#include "cuda/allocator/pending_frees.h"

namespace vt::cuda {
namespace {

ApiStatus not_ready() { return {ApiCode::NotReady, 0, "the work before the event still runs"}; }

}  // namespace

void PendingFrees::add(Block* block) {
  try {
    for (const StreamUse& use : block->uses) {
      Queue* queue = nullptr;
      for (Queue& candidate : queues_) {
        if (candidate.stream == use.stream) queue = &candidate;
      }
      if (!queue) queue = &queues_.emplace_back(Queue{use.stream, {}});
      queue->entries.push_back({nullptr, use.capture, block});
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
      record(queue.entries[i], queue.stream);
    }
  }
  block->outstanding = static_cast<uint32_t>(block->uses.size());
  ++waiting_;
}

void PendingFrees::record(Entry& entry, StreamHandle stream) noexcept {
  uint64_t capture = 0;
  if (!device_.capture_id(stream, &capture).ok()) return;
  if (capture != entry.capture) {
    if (capture != 0) return;  // an event of this capture would not stand for the use
    entry.capture = 0;         // the use's capture is over
  }
  EventHandle event = nullptr;
  if (!events_.empty()) {
    event = events_.back();
    events_.pop_back();
  } else if (!device_.create_event(&event).ok()) {
    return;
  }
  if (device_.record_event(event, stream).ok()) {
    entry.event = event;
  } else {
    keep_event(event);
  }
}

bool PendingFrees::order_after(StreamHandle waiter, const StreamUse& use) noexcept {
  uint64_t capture = 0;
  if (!device_.capture_id(waiter, &capture).ok() || capture != use.capture) return false;
  Entry entry{nullptr, use.capture, nullptr};
  record(entry, use.stream);
  if (!entry.event) return false;
  const bool ordered = entry.capture == capture && device_.wait_event(waiter, entry.event).ok();
  keep_event(entry.event);
  return ordered;
}

void PendingFrees::keep_event(EventHandle event) noexcept {
  try {
    events_.push_back(event);
  } catch (const std::bad_alloc&) {
    device_.destroy_event(event);
  }
}

ApiStatus PendingFrees::resolve(Queue& queue, const StreamHandle* own, uint64_t own_capture,
                                bool wait) {
  Entry& entry = queue.entries.front();
  if (!entry.event) {
    // Recorded later than the free, the event stands for more work than it must: safe.
    record(entry, queue.stream);
    if (!entry.event) {
      uint64_t capture = 0;
      const ApiStatus status = device_.capture_id(queue.stream, &capture);
      if (!status.ok()) return status;
      return wait && capture == 0 ? device_.synchronize_stream(queue.stream) : not_ready();
    }
  }
  if (entry.capture != 0) {
    uint64_t now = 0;
    const ApiStatus status = device_.capture_id(queue.stream, &now);
    if (!status.ok()) return status;
    if (now != entry.capture) return {};  // that capture is over; its work runs in replays
    if (own_capture == entry.capture) return device_.wait_event(*own, entry.event);
    return not_ready();
  }
  if (own_capture != 0) return not_ready();
  return wait ? device_.synchronize_event(entry.event) : device_.query_event(entry.event);
}

ApiStatus PendingFrees::process(const StreamHandle* own, bool wait, std::vector<Block*>& done) {
  if (empty()) return {};
  uint64_t own_capture = 0;
  ApiStatus result;
  if (own) result = device_.capture_id(*own, &own_capture);
  if (!result.ok()) return result;
  for (Queue& queue : queues_) {
    while (!queue.entries.empty()) {
      const ApiStatus status = resolve(queue, own, own_capture, wait);
      if (status.code == ApiCode::NotReady) break;
      if (!status.gone()) {
        result = status;
        break;
      }
      const Entry entry = queue.entries.front();
      queue.entries.pop_front();
      if (entry.event) keep_event(entry.event);
      if (--entry.block->outstanding == 0) {
        --waiting_;
        done.push_back(entry.block);  // the caller reserved room
      }
    }
  }
  return result;
}

void PendingFrees::destroy_events() noexcept {
  std::erase_if(events_, [&](EventHandle event) { return device_.destroy_event(event).gone(); });
}

}  // namespace vt::cuda
