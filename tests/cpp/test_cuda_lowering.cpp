// Captured steps as CUDA graphs (csrc/cuda/graph.cpp) on a runtime without a device: what a replay
// reads, what lives how long, and that a failure of any call leaves everything as before.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "core/device_backend.h"
#include "core/kernel_switches.h"
#include "core/rebinding.h"
#include "cuda/allocator.h"
#include "cuda/device.h"
#include "cuda/graph.h"
#include "cuda/graph_transfers.h"
#include "cuda/stream.h"
#include "cuda/sync.h"
#include "dispatch/kernels.h"
#include "graphs/program.h"
#include "stub_cuda_runtime.h"
#include "test_cuda_allocator.h"

// The graph's own kernels, as cuda/kernels/graph_transfers.cu has them.
namespace vt::cuda {

void begin_run(Stream stream, std::byte* control, size_t nbytes, const RunSlots& from,
               std::span<const TransferEntry> inputs) {
  const std::vector<TransferEntry> all(inputs.begin(), inputs.end());
  stub::enqueue(stream.handle, [=] {
    if (from.slots) std::memcpy(control, from.slots + *from.turn * from.pitch, nbytes);
    for (const TransferEntry& t : all) {
      const void* source = nullptr;
      std::memcpy(&source, control + t.address, sizeof source);
      if (source) std::memcpy(t.place, source, t.nbytes);
    }
    if (from.slots) *from.turn = (*from.turn + 1) % from.count;
  });
}
void end_run(Stream stream, const std::byte* control, std::span<const TransferEntry> results) {
  if (results.empty()) return;
  const std::vector<TransferEntry> all(results.begin(), results.end());
  stub::enqueue(stream.handle, [=] {
    for (const TransferEntry& t : all) {
      void* target = nullptr;
      std::memcpy(&target, control + t.address, sizeof target);
      if (target) std::memcpy(target, t.place, t.nbytes);
    }
  });
}

void fill_by_kernels(cudaGraph_t) {}

}  // namespace vt::cuda

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;
using graphs::Call;
using graphs::Program;

constexpr Device kCuda{DeviceType::CUDA, 0};
constexpr int64_t kSize = 1024;

class Backend final : public DeviceBackend {
 public:
  int count() const override { return 1; }
  std::string problem() const override { return {}; }
  int current() const override { return 0; }
  void synchronize(int) override { stub::finish_all(); }
  void record_stream(const Storage&, int, uintptr_t) override {}
  uintptr_t current_stream(int) const override { return 0; }
  void order_streams(int, uintptr_t, bool) override {}
  Allocation allocate_pinned(size_t n) override { return pinned_allocator().allocate(n); }
  bool is_pinned(const void*) const override { return false; }
  int device_of(const void*) const override { return 0; }
};

// Kernels of float tensors, as those of the library: work on the current stream, numbers of the
// host by value, temporaries from the allocator.

cudaStream_t here() { return cuda::current_stream(0).handle; }

/// self += value (a number of the host, or a tensor of the device).
void fill(const Tensor& self, const Tensor& value) {
  auto* to = self.data_as<float>();
  const int64_t n = self.numel();
  if (value.device().is_cpu()) {
    const auto number = static_cast<float>(load_scalar(value.data(), value.dtype()).to_double());
    stub::enqueue(here(), [=] {
      for (int64_t i = 0; i < n; ++i) to[i] += number;
    });
    return;
  }
  const auto* from = static_cast<const double*>(value.data());
  stub::enqueue(here(), [=] {
    for (int64_t i = 0; i < n; ++i) to[i] += static_cast<float>(*from);
  });
}
void copy(const Tensor& self, const Tensor& source, bool) {
  check(source.device().is_cuda(), "a copy from the host cannot be captured");
  if (self.numel() > 1 && self.numel() == kSize / 2)  // an op that waits, as a wrong kernel would
    wait_for_result(here(), "a copy");
  const auto bytes = static_cast<size_t>(self.numel()) * 4;
  // Through a temporary, given back at once.
  const Allocation between = allocator_for(DeviceType::CUDA).allocate(bytes, kCuda);
  cudaMemcpyAsync(between.data, source.data(), bytes, cudaMemcpyDeviceToDevice, here());
  cudaMemcpyAsync(self.data(), between.data, bytes, cudaMemcpyDeviceToDevice, here());
  give_back(between);
}
void uniform(const Tensor& self, double, double, const PhiloxArgs& rng) {
  auto* to = self.data_as<float>();
  const auto switches = static_cast<float>(kernel_switches());
  stub::enqueue(here(), [=] {
    to[2] = switches;
    const uint64_t seed = rng.state ? rng.state[0] : rng.seed;
    const uint64_t offset = rng.state ? rng.state[1] + rng.offset : rng.offset;
    to[0] = static_cast<float>(seed);
    to[1] = static_cast<float>(offset);
  });
}

void install() {
  static Backend backend;
  set_backend(DeviceType::CUDA, &backend);
  install_allocator();
  install_lowering();
  KernelTable& table = kernels_for(DeviceType::CUDA);
  table.fill_ = fill;
  table.copy_ = copy;
  table.uniform_ = uniform;
  // The host's count of steps.
  kernels_for(DeviceType::CPU).fill_ = [](const Tensor& self, const Tensor& value) {
    *self.data_as<double>() += load_scalar(value.data(), value.dtype()).to_double();
  };
}

Ref<Call> make_call(OpId id, std::vector<Value> args, int64_t random_offset = -1) {
  auto call = make_ref<Call>();
  call->id = id;
  call->args = std::move(args);
  call->outputs = {0};
  call->random_offset = random_offset;
  return call;
}
Tensor device_tensor(int64_t n = kSize) {
  const Tensor t = empty(Dims{n}, DType::Float32, kCuda);
  std::memset(t.data(), 0, static_cast<size_t>(n) * 4);
  return t;
}
Tensor number(double value) {
  const Tensor t = empty({}, DType::Float64);
  *t.data_as<double>() = value;
  return t;
}

/// A step: total += 2; total += count, where the host counts; kept = total; drawn = random numbers.
struct Step {
  Tensor total = device_tensor(), kept = device_tensor(), drawn = device_tensor();
  Tensor count = number(0);
  Ref<Program> program = make_ref<Program>();

  explicit Step(int64_t kept_size = kSize) : kept(device_tensor(kept_size)) {
    add(OpId::fill_, total, number(2));
    add(OpId::fill_, count, number(1));
    add(OpId::fill_, total, program->upload(count, kCuda));
    const Tensor part = make_view(total, Dims{kept_size}, Dims{1}, 0);
    const Tensor inputs[] = {kept, part};
    program->add(*make_call(OpId::copy_, {Tensor(), Tensor(), false}), inputs, {&kept, 1});
    program->add(*make_call(OpId::uniform_, {Tensor(), 0.0, 1.0, PhiloxArgs{}}, 7), {&drawn, 1},
                 {&drawn, 1});
    program->draw(kCuda, 16);
  }
  void add(OpId id, const Tensor& self, const Tensor& value) {
    const Tensor inputs[] = {self, value};
    program->add(*make_call(id, {Tensor(), Tensor()}), inputs, {&self, 1});
  }
  void lower(graphs::PoolHandle pool = {}) {
    program->lower(graphs::lowering_for(DeviceType::CUDA).pool(kCuda, pool));
  }
};
float first(const Tensor& t) { return *t.data_as<float>(); }

void replays_read_the_control_block() {
  default_generator(kCuda)->set_state(5, 100);
  Step step;
  step.lower();
  CHECK((step.program->nodes() == std::vector<size_t>{1, 0, 1, 2, 1}));
  // And what brings the control block.
  CHECK(step.program->on_device()->node_kinds().at("kernel") == 5 + 1);
  CHECK(first(step.total) == 0 && stub::captures() == 0 && !capturing());
  float expected = 0;
  for (int run = 1; run <= 20; ++run) {
    step.program->run();
    expected += 2 + static_cast<float>(run);
    if (run % 5 != 0) continue;  // several are under way at once
    stub::finish_all();
    CHECK(first(step.total) == expected && first(step.kept) == expected);
    CHECK(first(step.drawn) == 5);
    CHECK(step.drawn.data_as<float>()[1] == static_cast<float>(100 + 16 * (run - 1) + 7));
  }
  CHECK(*step.count.data_as<double>() == 20);
}

/// The graph fetches an input and sends a result, where a run is told of them.
void kernels_see_the_switches_of_the_recording() {
  const uint32_t start = kernel_switches();
  set_kernel_switch(KernelSwitch::MatmulTf32, true);
  Step step;
  set_kernel_switch(KernelSwitch::MatmulTf32, false);
  step.lower();
  step.program->run();
  stub::finish_all();
  const uint32_t recorded = start | static_cast<uint32_t>(KernelSwitch::MatmulTf32);
  CHECK(step.drawn.data_as<float>()[2] == static_cast<float>(recorded));
  CHECK(kernel_switches() == start);
}

void transfers() {
  Step step;
  const Tensor input = device_tensor(), result = device_tensor();
  const size_t in = step.program->copy_in(step.total), out = step.program->copy_out(step.kept);
  step.lower();
  for (int run = 1; run <= 12; ++run) {
    const bool fetches = run % 3 != 0, sends = run % 2 == 0;
    stub::finish_all();
    const float before = fetches ? static_cast<float>(10 * run) : first(step.total);
    *input.data_as<float>() = static_cast<float>(10 * run);
    *result.data_as<float>() = -1;
    step.program->join();
    if (fetches) step.program->bind(in, input.data());
    if (sends) step.program->bind(out, result.data());
    step.program->run();
    step.program->extend();
    stub::finish_all();
    const float expected = before + 2 + static_cast<float>(run);
    CHECK(first(step.total) == expected);
    CHECK(first(result) == (sends ? expected : -1));
  }
  // What was bound for a run that did not come is forgotten.
  step.program->bind(in, input.data());
  step.program->join();
  const float before = first(step.total);
  step.program->run();
  stub::finish_all();
  CHECK(first(step.total) == before + 2 + 13);
}

void streams_take_turns() {
  Step step;
  step.lower();
  const Stream before = cuda::current_stream(0);
  const Stream streams[] = {pool_stream(0, 0), pool_stream(0, 0), before};
  float expected = 0;
  for (int run = 1; run <= 9; ++run) {
    set_current_stream(streams[run % 3]);
    step.program->join();
    step.program->run();
    expected += 2 + static_cast<float>(run);
  }
  set_current_stream(before);
  // The last run was given to the third stream: it comes after all others.
  cuda::synchronize(streams[0]);
  CHECK(first(step.total) == expected);
  stub::finish_all();
}

void dropped_while_running() {
  const Tensor kept = device_tensor();
  {
    Step step;
    step.kept = kept;
    Tensor total = step.total;
    step.lower();
    step.program->run();
    step.program->run();
  }
  CHECK(stub::graphs() == 2 && collect_graphs() == 1);
  empty_cache();  // waits; what the graph uses must still be there
  stub::finish_all();
  CHECK(collect_graphs() == 0 && stub::graphs() == 0);
}

void memory_that_moved_is_noticed() {
  Step step;
  step.lower();
  step.program->run();
  stub::finish_all();
  step.total.storage()->replace(allocator_for(DeviceType::CUDA).allocate(kSize * 4, kCuda));
  rebindings.fetch_add(1);
  const double counted = *step.count.data_as<double>();
  CHECK(contains(error_of([&] { step.program->run(); }).second, "has moved"));
  CHECK(*step.count.data_as<double>() == counted);  // nothing of the run has happened
}

void ops_that_wait_are_refused() {
  Step step(kSize / 2);
  const auto [kind, message] = error_of([&] { step.lower(); });
  CHECK(contains(message, "op 3 of 4, copy_, cannot be part of a CUDA graph"));
  CHECK(contains(message, "wait for the device"));
  CHECK(step.program->failed_op() == 3 && !step.program->on_device());
  CHECK(stub::captures() == 0 && !capturing() && cuda::current_stream(0).handle == nullptr);
}

/// The driver refuses waits for a device that a stream is captured on, and gives the capture up.
void captures_and_waits_for_the_device_keep_apart() {
  std::atomic<bool> stop{false};
  std::atomic<int> waits{0};
  std::string problem;  // of the one who waits
  std::thread waiter([&] {
    while (!stop && problem.empty()) {
      problem = error_of([] { synchronize_device(0); }).second;
      ++waits;
    }
  });
  for (int round = 0; round < 200 || waits < 50; ++round) {
    Step step;
    CHECK_EMPTY(error_of([&] { step.lower(); }).second);
  }
  stop = true;
  waiter.join();
  CHECK_EMPTY(problem);
  CHECK(stub::captures() == 0);
}

void captured_streams_are_refused() {
  Step step;
  step.lower();
  const Stream stream = pool_stream(0, 0), before = cuda::current_stream(0);
  cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeRelaxed);
  set_current_stream(stream);
  CHECK(contains(error_of([&] { step.program->run(); }).second, "being captured"));
  Step other;
  CHECK(contains(error_of([&] { other.lower(); }).second, "being captured"));
  set_current_stream(before);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream.handle, &graph);
  cudaGraphDestroy(graph);
}

void pools_are_shared_by_name() {
  auto& lowering = graphs::lowering_for(DeviceType::CUDA);
  const Ref<graphs::Pool> pool = lowering.pool(kCuda, {});
  const graphs::PoolHandle name = pool->handle();
  const Ref<Storage> arena = pool->arena(1000);
  CHECK(lowering.pool(kCuda, name)->arena(600) == arena);
  const Ref<Storage> larger = lowering.pool(kCuda, name)->arena(5000);
  CHECK(larger->nbytes() >= 5000 && pool->arena(1) == larger);
  CHECK(!(lowering.pool(kCuda, {})->handle() == name));
  CHECK(CachingAllocator::pool_of(arena->allocation().context) ==
        (MempoolId{name.first, name.second}));
  Step a, b;
  a.lower(name);
  b.lower(name);
  for (int run = 0; run < 3; ++run) {
    a.program->run();
    b.program->run();
  }
  stub::finish_all();
  CHECK(first(a.kept) == first(b.kept) && first(a.kept) == 12);
}

/// Every call of the runtime fails once, while a step is handed over and while it runs.
void any_call_may_fail() {
  CachingAllocator& allocator = device_allocator(0);
  int failures = 0;
  for (int64_t n = 1;; ++n) {
    // No memory from before, so that the calls which get some are made again.
    stub::finish_all();
    collect_graphs();
    empty_cache();
    const PhiloxArgs numbers = default_generator(kCuda)->state();
    Step step;
    const auto pool = graphs::lowering_for(DeviceType::CUDA).pool(kCuda, {});
    const graphs::PoolHandle name = pool->handle();
    stub::fail_call(n);
    const std::string lowered = error_of([&] { step.program->lower(pool); }).second;
    const bool during_lowering = stub::has_failed();
    if (during_lowering) {
      stub::fail_call(0);
      failures += !lowered.empty();
      CHECK(stub::captures() == 0);
      CHECK(!capturing());
      CHECK(cuda::current_stream(0).handle == nullptr);
      const PhiloxArgs now = default_generator(kCuda)->state();
      CHECK(now.seed == numbers.seed && now.offset == numbers.offset);
      CHECK(allocator.use_count({name.first, name.second}) == 1);
      if (!lowered.empty()) {
        Step again;
        again.lower(name);
        again.program->run();
        stub::finish_all();
        CHECK(first(again.total) == 3);
        continue;
      }
    }
    CHECK(lowered.empty());
    const std::string ran = error_of([&] { step.program->run(); }).second;
    const bool failed = stub::has_failed();
    stub::fail_call(0);
    failures += !ran.empty();
    step.program->run();
    stub::finish_all();
    CHECK(first(step.drawn) == static_cast<float>(default_generator(kCuda)->seed()));
    if (!during_lowering && !failed) break;  // all calls have failed once
  }
  CHECK(failures > 10);
}

}  // namespace

int main() {
  install();
  replays_read_the_control_block();
  kernels_see_the_switches_of_the_recording();
  transfers();
  streams_take_turns();
  dropped_while_running();
  memory_that_moved_is_noticed();
  ops_that_wait_are_refused();
  captures_and_waits_for_the_device_keep_apart();
  captured_streams_are_refused();
  pools_are_shared_by_name();
  any_call_may_fail();
  stub::finish_all();
  CHECK(collect_graphs() == 0 && stub::graphs() == 0);
  CHECK_EMPTY(device_allocator(0).check_invariants());
  return finish("test_cuda_lowering");
}
