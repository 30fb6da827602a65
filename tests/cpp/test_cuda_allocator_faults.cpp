// Driver failures: every single call of a program fails in turn, and the pools must be consistent,
// usable and empty afterwards. Also the ends of things: an allocator or a context that is gone
// before its memory, a forked child.
#include "test_cuda_allocator.h"

#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <vector>

#include "cuda/allocator/pinned_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

struct Attempt {
  int64_t calls = 0;
  int refused = 0;
};

/// A program that passes through every part of the allocator. Requests that are refused are
/// skipped; whatever was got is used and given back.
void program(SimulatedDevice& device, CachingAllocator& allocator, int* refused) {
  std::vector<Allocation> live;
  const auto get = [&](size_t nbytes, StreamHandle stream) {
    try {
      live.push_back(allocator.allocate(nbytes, stream));
      device.launch(stream, {{address_of(live.back()), nbytes, true}});
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::OutOfMemory || e.kind() == ErrorKind::Runtime);
      CHECK(contains(e.message(), "cuda:0"));
      ++*refused;
    }
  };
  const auto drop = [&](size_t keep) {
    while (live.size() > keep) {
      give_back(live.back());
      live.pop_back();
    }
  };
  const auto share = [&](StreamHandle owner, StreamHandle other) {
    if (live.empty() || CachingAllocator::stream_of(live.back().context) != owner) return;
    device.wait_stream(other, owner);
    device.launch(other, {{address_of(live.back()), live.back().nbytes, true}});
    allocator.record_stream(live.back().context, other);
    device.wait_stream(owner, other);
  };
  const StreamHandle main = device.create_stream(), side = device.create_stream();
  const bool pools = allocator.settings().backend == Backend::Native;
  for (int round = 0; round < 2; ++round) {
    for (size_t nbytes : {1000ul, 200 * KiB, 900 * KiB, 3 * MiB, 17 * MiB, 40 * MiB}) {
      get(nbytes, main);
    }
    drop(3);
    get(30 * MiB, main);
    share(main, side);
    drop(2);
    get(30 * MiB, main);  // the first still waits
    get(5 * MiB, side);
    drop(0);
    allocator.empty_cache();
    if (pools) {
      const MempoolId pool = allocator.create_pool();
      device.begin_capture(main);
      device.wait_stream(side, main);
      allocator.begin_allocate_to_pool(pool, AllocationRoute::on_stream(main));
      get(10 * MiB, main);
      share(main, side);
      drop(0);
      get(10 * MiB, main);
      drop(0);
      allocator.end_allocate_to_pool(pool);
      device.end_capture(main);
      allocator.release_pool(pool);
    }
    // More than there is: the whole ladder.
    get(70 * MiB, side);
    get(50 * MiB, main);
    get(60 * MiB, main);
    drop(0);
    get(100 * MiB, main);
    drop(0);
    allocator.release_stream(side);
  }
}

Attempt attempt(const char* settings, int64_t fail_at, ApiCode code, bool until_cleared) {
  SimulatedOptions options;
  options.memory = 128 * MiB;
  SimulatedDevice device(options);
  Attempt out;
  {
    CachingAllocator allocator(device, 0, parse_settings(settings));
    const int64_t before = device.calls();
    if (fail_at > 0 && !until_cleared) device.fail_nth_call(fail_at, code);
    if (until_cleared) device.fail_randomly(0.3, code);
    program(device, allocator, &out.refused);
    out.calls = device.calls() - before;
    CHECK_EMPTY(allocator.check_invariants());
    const MemoryStats stats = allocator.stats();
    CHECK(stats.allocated_bytes.all.current == 0);
    device.clear_faults();
    // Whatever happened, the device is usable in full.
    allocator.empty_cache();
    const auto [kind, message] = error_of([&] {
      const Allocation all = allocator.allocate(120 * MiB, nullptr);
      device.launch(nullptr, {{address_of(all), all.nbytes, true}});
      give_back(all);
    });
    CHECK_EMPTY(message);
    allocator.empty_cache();
    CHECK_EMPTY(allocator.check_invariants());
    CHECK(device.memory_in_use() == 0);
  }
  CHECK_EMPTY(device.misuse());
  CHECK_EMPTY(device.leaks());
  return out;
}

void every_call_fails_in_turn() {
  for (const char* settings :
       {"expandable_segments:true", "expandable_segments:false",
        "expandable_segments:true,garbage_collection_threshold:0.4", "backend:async"}) {
    const Attempt clean = attempt(settings, 0, ApiCode::Failed, false);
    CHECK(clean.calls > 30);
    int felt = 0;
    for (const ApiCode code : {ApiCode::Failed, ApiCode::OutOfMemory}) {
      for (int64_t n = 1; n <= clean.calls; ++n) {
        const int before = failures;
        if (attempt(settings, n, code, false).refused > clean.refused) ++felt;
        if (failures != before) {
          std::printf("with call %lld of \"%s\" failing\n", static_cast<long long>(n), settings);
          return;
        }
      }
    }
    CHECK(felt > 0);
    std::printf("%s: %lld calls failed in turn, twice; %d were felt\n", settings,
                static_cast<long long>(clean.calls), felt);
    for (int i = 0; i < 50; ++i) attempt(settings, 1, ApiCode::Failed, true);
  }
}

void failures_are_named() {
  SimulatedDevice device;
  CachingAllocator allocator(device, 0, {});
  device.fail_nth_call(SimulatedCall::CreatePhysical, 1, ApiCode::Failed);
  auto [kind, message] = error_of([&] { allocator.allocate(5 * MiB, nullptr); });
  CHECK(kind == ErrorKind::Runtime);
  CHECK(contains(message, "cannot allocate 5242880 bytes: a fault was injected"));
  give_back(allocator.allocate(5 * MiB, nullptr));
  device.fail_nth_call(SimulatedCall::MemoryInfo, 1, ApiCode::Failed);
  std::tie(kind, message) = error_of([&] { CachingAllocator other(device, 1, {}); });
  CHECK(contains(message, "cuda:1: the memory size cannot be read"));
}

void memory_may_outlive_its_allocator() {
  SimulatedDevice device;
  auto allocator = std::make_unique<CachingAllocator>(device, 0, AllocatorSettings{});
  auto pinned = std::make_unique<PinnedAllocator>(device, AllocatorSettings{});
  const Allocation a = allocator->allocate(3 * MiB, nullptr);
  const Allocation b = allocator->allocate(100, device.create_stream());
  const Allocation c = pinned->allocate(100);
  allocator.reset();
  pinned.reset();
  give_back(a);
  give_back(b);
  give_back(c);
  CHECK_EMPTY(device.misuse());
}

void a_dead_context_is_no_trouble() {
  for (const char* settings :
       {"expandable_segments:true", "expandable_segments:false", "backend:async"}) {
    SimulatedDevice device;
    CachingAllocator allocator(device, 0, parse_settings(settings));
    PinnedAllocator pinned(device, {});
    const StreamHandle side = device.create_stream();
    const Allocation a = allocator.allocate(3 * MiB, nullptr);
    const Allocation b = allocator.allocate(100, nullptr);
    const Allocation c = pinned.allocate(100);
    allocator.record_stream(a.context, side);
    pinned.record_stream(c.context, side);
    device.kill();
    give_back(a);
    give_back(b);
    give_back(c);
    allocator.empty_cache();
    pinned.empty_cache();
    auto [kind, message] = error_of([&] { allocator.allocate(200 * MiB, nullptr); });
    CHECK(kind == ErrorKind::Runtime && contains(message, "the CUDA context is gone"));
    CHECK_EMPTY(device.misuse());
  }
}

int status_of_child(const std::function<int()>& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void a_forked_child_leaves_the_memory_alone() {
  SimulatedDevice device;
  auto allocator = std::make_unique<CachingAllocator>(device, 0, AllocatorSettings{});
  const Allocation a = allocator->allocate(3 * MiB, nullptr);
  const int status = status_of_child([&] {
    const int64_t calls = device.calls();
    give_back(a);
    allocator->empty_cache();
    allocator->record_stream(a.context, nullptr);
    const auto [kind, message] = error_of([&] { allocator->allocate(10, nullptr); });
    if (!contains(message, "forked child")) return 2;
    allocator.reset();
    return device.calls() == calls ? 0 : 3;
  });
  CHECK(status == 0);
  give_back(a);
  give_back(allocator->allocate(10, nullptr));
  allocator.reset();
  CHECK_EMPTY(device.leaks());
}

}  // namespace

int main() {
  every_call_fails_in_turn();
  failures_are_named();
  memory_may_outlive_its_allocator();
  a_dead_context_is_no_trouble();
  a_forked_child_leaves_the_memory_alone();
  return finish("test_cuda_allocator_faults");
}
