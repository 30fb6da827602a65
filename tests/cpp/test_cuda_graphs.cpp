// What captured steps on CUDA need besides the driver's graphs: the ring of page-locked memory that
// a run is told its numbers in, and the list of what was dropped while the device may still use it.
#include <atomic>
#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "cuda/allocator/retired.h"
#include "cuda/allocator/staging_ring.h"
#include "test_cuda_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

struct Fixture {
  Fixture() { device.set_progress(0); }
  ~Fixture() {
    CHECK_EMPTY(memory->check_invariants());
    memory.reset();
    CHECK_EMPTY(device.misuse());
    CHECK_EMPTY(device.leaks());
  }
  SimulatedDevice device;
  std::unique_ptr<PinnedAllocator> memory =
      std::make_unique<PinnedAllocator>(device, parse_settings(""));
};

/// A run of a graph that reads a slot.
void read(Fixture& f, StreamHandle stream, const std::byte* slot, size_t nbytes) {
  f.device.launch(stream, {{reinterpret_cast<uintptr_t>(slot), nbytes, false}});
}

void host_and_device_take_turns() {
  Fixture f;
  const StreamHandle stream = f.device.create_stream();
  for (const size_t nbytes : {size_t{16}, 100 * KiB}) {
    StagingRing ring(f.device, *f.memory, nbytes);
    CHECK(ring.last() == nullptr);
    std::set<std::byte*> slots;
    for (size_t run = 0; run < 3 * ring.slots(); ++run) {
      std::byte* slot = ring.current();
      CHECK(slot == ring.current());
      // The simulated device reports a host that writes what a run may still read.
      f.device.use_on_host(reinterpret_cast<uintptr_t>(slot), nbytes);
      read(f, stream, slot, nbytes);
      ring.sent(stream);
      CHECK(slots.insert(slot).second == (run < ring.slots()));
    }
    CHECK(slots.size() == ring.slots() && ring.slots() >= 2);
    for (std::byte* slot : slots) CHECK(reinterpret_cast<uintptr_t>(slot) % 256 == 0);
    ring.last()->wait();
    CHECK(ring.last()->passed());
  }
}

void a_slot_waits_for_its_reader_only() {
  Fixture f;
  const StreamHandle stream = f.device.create_stream();
  StagingRing ring(f.device, *f.memory, 64);
  const auto waits = [&] { return f.device.calls(SimulatedCall::SynchronizeEvent); };
  for (size_t run = 0; run < ring.slots(); ++run) {
    read(f, stream, ring.current(), 64);
    ring.sent(stream);
  }
  CHECK(waits() == 0);  // nothing to wait for the first time round
  ring.current();
  CHECK(waits() == 1);
  CHECK(!ring.last()->passed());  // the latest runs go on
  ring.last()->wait();
}

void other_streams_are_ordered() {
  Fixture f;
  const StreamHandle a = f.device.create_stream(), b = f.device.create_stream();
  const Allocation control = f.memory->allocate(256);
  {
    StagingRing ring(f.device, *f.memory, 64);
    f.device.launch(a, {{address_of(control), 256, true}});
    ring.current();
    ring.sent(a);
    ring.last()->order(b);
    f.device.launch(b, {{address_of(control), 256, true}});
    CHECK_EMPTY(f.device.misuse());
    ring.current();
    ring.sent(b);
    ring.last()->wait();
  }
  give_back(control);
}

void a_device_that_refuses_is_waited_for() {
  Fixture f;
  const StreamHandle stream = f.device.create_stream();
  StagingRing ring(f.device, *f.memory, 64);
  std::byte* slot = ring.current();
  read(f, stream, slot, 64);
  f.device.fail_nth_call(SimulatedCall::RecordEvent, 1, ApiCode::Failed);
  CHECK(contains(error_of([&] { ring.sent(stream); }).second, "recording an event"));
  // The work counts as sent, as the device counts it, and nobody reads its slot any longer.
  CHECK(ring.current() == slot + 256);
  f.device.use_on_host(reinterpret_cast<uintptr_t>(slot), 64);
  CHECK_EMPTY(f.device.misuse());
}

void a_ring_without_memory_leaves_nothing() {
  Fixture f;
  for (int call = 1; call < 10; ++call) {
    f.device.fail_nth_call(SimulatedCall::CreateEvent, call, ApiCode::Failed);
    CHECK(!error_of([&] { const StagingRing ring(f.device, *f.memory, 64); }).second.empty() ||
          call > 8);
    f.device.clear_faults();
  }
  f.device.fail_nth_call(SimulatedCall::AllocateHost, 1, ApiCode::OutOfMemory);
  f.memory->empty_cache();
  const auto [kind, message] =
      error_of([&] { const StagingRing ring(f.device, *f.memory, size_t{1} << 40); });
  CHECK(kind == ErrorKind::OutOfMemory && !message.empty());
}

/// Tells when it is destroyed.
struct Flagged {
  explicit Flagged(std::atomic<int>& count) : count(count) {}
  ~Flagged() { ++count; }
  std::atomic<int>& count;
};

void dropped_graphs_live_until_their_run_is_done() {
  Fixture f;
  const StreamHandle stream = f.device.create_stream();
  RetiredList list;
  std::atomic<int> gone{0};
  list.add(nullptr, std::make_shared<Flagged>(gone));  // never ran
  CHECK(gone == 1 && list.size() == 0);
  const Allocation memory = f.memory->allocate(4096);
  auto first = std::make_shared<DeviceEvent>(f.device);
  auto second = std::make_shared<DeviceEvent>(f.device);
  f.device.launch(stream, {{address_of(memory), 4096, true}});
  first->record(stream);
  list.add(first, std::make_shared<Flagged>(gone));
  f.device.launch(stream, {{address_of(memory), 4096, true}});
  second->record(stream);
  list.add(second, std::make_shared<Flagged>(gone));
  CHECK(gone == 1 && list.collect() == 2);
  first->wait();
  CHECK(list.collect() == 1 && gone == 2);
  second->wait();
  CHECK(list.collect() == 0 && gone == 3);
  // Done before it is dropped: gone at once.
  list.add(second, std::make_shared<Flagged>(gone));
  CHECK(gone == 4 && list.size() == 0);
  give_back(memory);
}

void a_lost_device_holds_nothing_back() {
  Fixture f;
  const StreamHandle stream = f.device.create_stream();
  RetiredList list;
  std::atomic<int> gone{0};
  {
    auto event = std::make_shared<DeviceEvent>(f.device);
    f.device.launch(stream, {});
    event->record(stream);
    list.add(event, std::make_shared<Flagged>(gone));
  }
  CHECK(gone == 0);
  f.device.fail_nth_call(SimulatedCall::QueryEvent, 1, ApiCode::Failed);
  CHECK(list.collect() == 0 && gone == 1);
}

void destructors_may_drop_more() {
  // As when the last holder of one graph is another graph's memory.
  Fixture f;
  RetiredList list;
  std::atomic<int> gone{0};
  const StreamHandle stream = f.device.create_stream();
  struct Nested {
    RetiredList& list;
    std::atomic<int>& gone;
    ~Nested() {
      list.add(nullptr, std::make_shared<Flagged>(gone));
      list.collect();
    }
  };
  auto event = std::make_shared<DeviceEvent>(f.device);
  f.device.launch(stream, {});
  event->record(stream);
  list.add(event, std::shared_ptr<Nested>(new Nested{list, gone}));
  event->wait();
  CHECK(list.collect() == 0 && gone == 1);
}

void any_thread_may_drop() {
  Fixture f;
  f.device.set_progress(0.3);
  RetiredList list;
  std::atomic<int> gone{0};
  std::vector<StreamHandle> streams;
  for (int i = 0; i < 4; ++i) streams.push_back(f.device.create_stream());
  std::vector<std::thread> threads;
  for (const StreamHandle stream : streams) {
    threads.emplace_back([&, stream] {
      for (int i = 0; i < 200; ++i) {
        auto event = std::make_shared<DeviceEvent>(f.device);
        f.device.launch(stream, {});
        event->record(stream);
        list.add(event, std::make_shared<Flagged>(gone));
        list.collect();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  f.device.synchronize_device();
  CHECK(list.collect() == 0 && gone == 800);
}

}  // namespace

int main() {
  host_and_device_take_turns();
  a_slot_waits_for_its_reader_only();
  other_streams_are_ordered();
  a_device_that_refuses_is_waited_for();
  a_ring_without_memory_leaves_nothing();
  dropped_graphs_live_until_their_run_is_done();
  a_lost_device_holds_nothing_back();
  destructors_may_drop_more();
  any_thread_may_drop();
  return finish("test_cuda_graphs");
}
