// The cost of an allocation and its release in steady state, and that it takes no driver call.
// Prints nanoseconds; the bound is loose, as it only has to find a lost fast path.
#include "test_cuda_allocator.h"

#include <chrono>
#include <thread>
#include <vector>

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

template <class F>
double best_nanoseconds(int repetitions, F&& f) {
  double best = 1e30;
  for (int round = 0; round < 7; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repetitions; ++i) f(i);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / repetitions);
  }
  return best;
}

}  // namespace

int main() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int kRepetitions = 2000;
  constexpr double kBound = 1e9;
#else
  constexpr int kRepetitions = 200000;
  constexpr double kBound = 1000;
#endif
  SimulatedOptions options;
  options.memory = size_t{8} << 30;
  SimulatedDevice device(options);
  CachingAllocator allocator(device, 0, {});
  const StreamHandle stream = device.create_stream();
  for (size_t nbytes : {size_t{4}, 16 * KiB, 256 * KiB, 4 * MiB, 100 * MiB}) {
    give_back(allocator.allocate(nbytes, stream));
    const int64_t calls = device.calls();
    const double pair =
        best_nanoseconds(kRepetitions, [&](int) { give_back(allocator.allocate(nbytes, stream)); });
    CHECK(device.calls() == calls);
    CHECK(pair < kBound);
    std::printf("%10zu bytes: %6.1f ns a pair\n", nbytes, pair);
  }
  std::vector<Allocation> ring(64);
  const double mixed = best_nanoseconds(kRepetitions, [&](int i) {
    Allocation& slot = ring[static_cast<size_t>(i) % ring.size()];
    give_back(slot);
    slot = allocator.allocate(static_cast<size_t>(1 + i % 37) * 3000, stream);
  });
  std::printf("mixed sizes, 64 live: %6.1f ns a pair\n", mixed);
  CHECK(mixed < kBound);
  for (const Allocation& a : ring) give_back(a);

  std::vector<std::thread> threads;
  std::vector<double> cost(2);
  for (size_t t = 0; t < cost.size(); ++t) {
    threads.emplace_back([&, t, own = device.create_stream()] {
      cost[t] =
          best_nanoseconds(kRepetitions, [&](int) { give_back(allocator.allocate(4096, own)); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("two threads on streams of their own: %6.1f and %6.1f ns a pair\n", cost[0], cost[1]);
  return finish("test_cuda_allocator_speed");
}
