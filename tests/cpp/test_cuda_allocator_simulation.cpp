// The simulated device itself: each kind of misuse is found, and correct programs pass.
#include "test_cuda_allocator.h"

namespace {

using namespace vt::cuda;
using namespace vt::cuda::testing;

constexpr size_t kPage = 2 * MiB;

struct Mapped {
  explicit Mapped(SimulatedDevice& device) : device(device) {
    CHECK(device.reserve_range(4 * kPage, &address).ok());
    CHECK(device.create_physical(kPage, &handle).ok());
    CHECK(device.map(address, kPage, handle).ok());
    CHECK(device.set_access(address, kPage).ok());
  }
  SimulatedDevice& device;
  uintptr_t address = 0;
  PhysicalHandle handle = 0;
};

void order_between_streams_is_checked() {
  SimulatedDevice device;
  const Mapped memory(device);
  const StreamHandle a = device.create_stream(), b = device.create_stream();
  device.launch(a, {{memory.address, 100, true}});
  device.launch(a, {{memory.address, 100, false}});
  device.wait_stream(b, a);
  device.launch(b, {{memory.address + 50, 100, false}});
  device.launch(a, {{memory.address, 50, true}});
  device.launch(a, {{memory.address + 50, 50, false}});  // reads need no order among each other
  CHECK_EMPTY(device.misuse());
  device.launch(a, {{memory.address + 99, 1, true}});
  CHECK(contains(device.misuse(),
                 "a write on stream 1 is not ordered after a read by work 1 of "
                 "stream 2"));
  CHECK(contains(device.misuse(), "launch("));  // with what led to it
}

void the_host_orders_what_it_waited_for() {
  SimulatedDevice device;
  device.set_progress(0);
  const Mapped memory(device);
  const StreamHandle a = device.create_stream(), b = device.create_stream();
  device.launch(a, {{memory.address, 100, true}});
  EventHandle event = nullptr;
  CHECK(device.create_event(&event).ok());
  CHECK(device.record_event(event, a).ok());
  CHECK(device.query_event(event).code == ApiCode::NotReady);
  for (int i = 0; i < 100; ++i) device.advance();
  CHECK(device.query_event(event).ok());
  device.launch(b, {{memory.address, 100, true}});
  CHECK_EMPTY(device.misuse());
  device.launch(a, {{memory.address, 100, false}});
  CHECK(contains(device.misuse(), "not ordered after a write"));
}

template <class F>
void misuse_is_found(const char* expected, F&& f) {
  SimulatedDevice device;
  const Mapped memory(device);
  f(device, memory);
  CHECK(contains(device.misuse(), expected));
}

void misuse_of_memory_is_found() {
  misuse_is_found("not mapped", [](SimulatedDevice& d, const Mapped& m) {
    d.launch(nullptr, {{m.address + kPage - 1, 2, true}});
  });
  misuse_is_found("over a mapping", [](SimulatedDevice& d, const Mapped& m) {
    PhysicalHandle other = 0;
    d.create_physical(kPage, &other);
    d.map(m.address, kPage, other);
  });
  misuse_is_found("not mapped", [](SimulatedDevice& d, const Mapped& m) {
    d.unmap(m.address, kPage);
    d.unmap(m.address, kPage);
  });
  misuse_is_found("before the host knows", [](SimulatedDevice& d, const Mapped& m) {
    d.launch(nullptr, {{m.address, 1, false}});
    d.unmap(m.address, kPage);
  });
  misuse_is_found("with memory mapped in it",
                  [](SimulatedDevice& d, const Mapped& m) { d.free_range(m.address, 4 * kPage); });
  misuse_is_found("a handle is released that is not there",
                  [](SimulatedDevice& d, const Mapped& m) {
                    d.release_physical(m.handle);
                    d.release_physical(m.handle);
                  });
  misuse_is_found("no order", [](SimulatedDevice& d, const Mapped&) {
    const StreamHandle side = d.create_stream();
    uintptr_t address = 0;
    d.allocate_async(100, nullptr, &address);
    d.launch(side, {{address, 100, true}});
    d.free_async(address, nullptr);
  });
  misuse_is_found("was not allocated so", [](SimulatedDevice& d, const Mapped&) {
    uintptr_t address = 0;
    d.allocate(100, &address);
    d.free(address);
    d.free(address);
  });
}

void misuse_of_captures_is_found() {
  misuse_is_found("synchronised while it is captured", [](SimulatedDevice& d, const Mapped&) {
    const StreamHandle stream = d.create_stream();
    d.begin_capture(stream);
    d.synchronize_stream(stream);
  });
  misuse_is_found("an event of a capture is queried", [](SimulatedDevice& d, const Mapped&) {
    const StreamHandle stream = d.create_stream();
    EventHandle event = nullptr;
    d.create_event(&event);
    d.begin_capture(stream);
    d.record_event(event, stream);
    d.end_capture(stream);
    d.query_event(event);
  });
  misuse_is_found("from outside it", [](SimulatedDevice& d, const Mapped&) {
    const StreamHandle stream = d.create_stream();
    d.begin_capture(stream);
    d.wait_stream(stream, nullptr);
  });
}

void faults_and_leaks_are_counted() {
  SimulatedDevice device;
  size_t free = 0, total = 0;
  device.fail_nth_call(2, ApiCode::Failed);
  CHECK(device.memory_info(&free, &total).ok());
  CHECK(device.memory_info(&free, &total).code == ApiCode::Failed);
  CHECK(device.memory_info(&free, &total).ok());
  device.fail_nth_call(SimulatedCall::Allocate, 2, ApiCode::OutOfMemory);
  uintptr_t a = 0, b = 0;
  CHECK(device.allocate(1000, &a).ok());
  CHECK(device.allocate(1000, &b).code == ApiCode::OutOfMemory);
  CHECK(device.calls() == 5 && device.calls(SimulatedCall::Allocate) == 2);
  CHECK(device.memory_in_use() == 1000);
  CHECK(device.leaks() == "1000 bytes of device memory, 1 allocations");
  CHECK(device.allocate(total, &b).code == ApiCode::OutOfMemory);
  CHECK(device.free(a).ok());
  CHECK_EMPTY(device.leaks());
  device.kill();
  CHECK(device.synchronize_device().code == ApiCode::Dead);
}

}  // namespace

int main() {
  order_between_streams_is_checked();
  the_host_orders_what_it_waited_for();
  misuse_of_memory_is_found();
  misuse_of_captures_is_found();
  faults_and_leaks_are_counted();
  return finish("test_cuda_allocator_simulation");
}
