// Blocks that were given back while other streams may still use them. Each waits for one event a
// stream. Guarded by the lock of the pool that owns it.
//
// While a stream is captured its events cannot be queried. A block that another stream used in the
// same capture as its own stream is in is reused by making the capture wait: an edge of the graph,
// and no memory is held back until the capture ends. Eager work from before the capture is another
// matter: an event for it can only be recorded, and waited for, after the capture.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "cuda/allocator/block.h"

namespace vt::cuda {

class PendingFrees {
 public:
  explicit PendingFrees(DeviceApi& device) : device_(device) {}
  PendingFrees(const PendingFrees&) = delete;
  PendingFrees& operator=(const PendingFrees&) = delete;

  /// Records an event on each stream of `block->uses`. An event that cannot be made or recorded is
  /// made up for later. Throws bad_alloc, then with nothing done.
  void add(Block* block);
  /// Makes `waiter` wait for `use`; false if that takes more than a wait between the streams: as
  /// one of them is in a capture that the other or the use is not in, or a call fails.
  bool order_after(StreamHandle waiter, const StreamUse& use) noexcept;
  bool empty() const { return waiting_ == 0; }
  size_t count() const { return waiting_; }

  /// Moves the blocks that nothing waits for any longer to `done`. `own` is the stream they will
  /// be used on; null: the host uses them. A failing driver call leaves its block waiting, and is
  /// returned.
  ApiStatus process(const StreamHandle* own, std::vector<Block*>& done);

  /// What the blocks wait for at present, one a stream, save streams being captured. The wait
  /// itself needs no lock, so that others can free blocks meanwhile:
  ///   waits = begin_wait(own); <unlock> wait(waits); <lock> end_wait(waits);
  /// After it `process` finds done what was waited for. Every begin_wait that is not empty has its
  /// end_wait.
  struct Wait {
    DeviceApi* device;
    StreamHandle stream;
    EventHandle event;  // null: all of the stream is waited for
    uint64_t up_to;     // entries with numbers up to this wait for it
    bool over = false;
  };
  std::vector<Wait> begin_wait(const StreamHandle* own);
  static void wait(std::vector<Wait>& waits) noexcept;
  void end_wait(const std::vector<Wait>& waits) noexcept;

  /// Destroys the events kept for reuse; those that fail stay for another try, and all while
  /// somebody waits.
  void destroy_events() noexcept;

 private:
  struct Entry {
    EventHandle event;  // null: none could be recorded yet
    uint64_t capture;   // the capture that the use and its event are part of; 0: eager
    Block* block;
    uint64_t number;  // ascending in a queue
  };
  struct Queue {
    DeviceApi* device;
    StreamHandle stream;
    std::deque<Entry> entries;
    uint64_t passed = 0;  // the host has waited for eager work of entries up to this number
  };

  /// Whether the first entry of `queue` is done; a status other than Ok or NotReady is an error.
  ApiStatus resolve(Queue& queue, const StreamHandle* own, uint64_t own_capture);
  void record(Entry& entry, DeviceApi& device, StreamHandle stream) noexcept;
  void keep_event(DeviceApi& device, EventHandle event) noexcept;

  DeviceApi& device_;
  std::vector<Queue> queues_;
  struct SpareEvent {
    DeviceApi* device;  // an event is recorded on streams of its own device only
    EventHandle event;
  };
  std::vector<SpareEvent> events_;
  size_t waiting_ = 0;  // blocks
  uint64_t last_number_ = 0;
  int waits_ = 0;  // begun and not ended: their events are neither reused nor destroyed
};

}  // namespace vt::cuda
