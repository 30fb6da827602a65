// Memory of one device, and pinned memory, that streams of another device work with: handles of
// streams mean something on their own device only, and all default streams have the same.
#include "test_cuda_allocator.h"

#include "cuda/allocator/pinned_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

void events_belong_to_a_device() {
  SimulatedDevice device;
  SimulatedPeer& peer = device.peer();
  EventHandle event = nullptr;
  CHECK(peer.create_event(&event).ok());
  CHECK(peer.record_event(event, peer.create_stream()).ok());
  CHECK(device.wait_event(nullptr, event).ok() && device.synchronize_event(event).ok());
  CHECK_EMPTY(device.misuse());
  CHECK(!device.record_event(event, nullptr).ok());
  CHECK(contains(device.misuse(), "on a stream of another device"));
  SimulatedDevice other;
  const StreamHandle side = other.peer().create_stream();
  CHECK(!contains(other.misuse(), "unknown stream"));
  other.launch(side, {});
  CHECK(contains(other.misuse(), "unknown stream"));
}

/// Copies from pinned memory by each stream of both devices in turn.
void pinned_memory_waits_for_its_copies_everywhere() {
  for (const bool late : {false, true}) {
    SimulatedDevice device;
    device.set_progress(0);
    SimulatedPeer& peer = device.peer();
    const StreamHandle own_side = device.create_stream(), side = peer.create_stream();
    {
      PinnedAllocator pinned(device, {});
      const auto copy = [&](DeviceApi& on, StreamHandle stream) {
        const Allocation a = pinned.allocate(MiB);
        const uintptr_t address = address_of(a);
        device.use_on_host(address, MiB);
        if (&on == &device)
          device.launch(stream, {{address, MiB, false}});
        else
          peer.launch(stream, {{address, MiB, false}});
        // Where no event can be had at the free, it is made up for later.
        if (late) device.fail_nth_call(SimulatedCall::CreateEvent, 1, ApiCode::Failed);
        pinned.record_stream(a.context, stream, on);
        give_back(a);
        device.clear_faults();
        const Allocation b = pinned.allocate(MiB);
        CHECK(address_of(b) != address);
        device.use_on_host(address_of(b), MiB);
        give_back(b);
        on.synchronize_stream(stream);
        CHECK(pinned.stats().pending_bytes > 0);
        pinned.process_pending();
        CHECK(pinned.stats().pending_bytes == 0);
      };
      for (int turn = 0; turn < 3; ++turn) {
        copy(peer, nullptr);
        copy(device, nullptr);
        copy(peer, side);
        copy(device, own_side);
      }
      CHECK(pinned.stats().num_host_alloc == 2);
      CHECK_EMPTY(pinned.check_invariants());
    }
    CHECK_EMPTY(device.misuse());
    CHECK_EMPTY(device.leaks());
  }
}

/// A tensor of this device that work on the other reads, on its default and on another stream.
void memory_waits_for_the_other_device(const char* settings) {
  SimulatedDevice device;
  device.set_progress(0);
  SimulatedPeer& peer = device.peer();
  const StreamHandle side = peer.create_stream();
  {
    CachingAllocator allocator(device, 0, parse_settings(settings));
    for (const StreamHandle reader : {StreamHandle(nullptr), side}) {
      // The default streams have one handle, and are two streams all the same.
      const Allocation a = allocator.allocate(3 * MiB, nullptr);
      device.launch(nullptr, {{address_of(a), a.nbytes, true}});
      EventHandle written = nullptr;
      CHECK(device.create_event(&written).ok() && device.record_event(written, nullptr).ok());
      CHECK(peer.wait_event(reader, written).ok() && device.destroy_event(written).ok());
      peer.launch(reader, {{address_of(a), a.nbytes, false}});
      allocator.record_stream(a.context, reader, peer);
      give_back(a);
      const Allocation b = allocator.allocate(3 * MiB, nullptr);
      device.launch(nullptr, {{address_of(b), b.nbytes, true}});
      give_back(b);
    }
    CHECK_EMPTY(allocator.check_invariants());
    allocator.empty_cache();
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
}

}  // namespace

int main() {
  events_belong_to_a_device();
  pinned_memory_waits_for_its_copies_everywhere();
  for (const char* settings :
       {"expandable_segments:true", "expandable_segments:false", "backend:async"})
    memory_waits_for_the_other_device(settings);
  return finish("test_cuda_allocator_devices");
}
