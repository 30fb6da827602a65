// Launches of kernels (csrc/cuda/launch.cpp) on a runtime without a device: each runs once, in
// order and with its own arguments, by whichever of the driver's functions it is made and
// whichever of them fails.
#include "cuda/launch.h"

#include <cstring>
#include <deque>
#include <functional>
#include <string_view>
#include <thread>
#include <vector>

#include "cuda/repeated_launch.h"
#include "stub_cuda_runtime.h"
#include "test_cuda_allocator.h"

namespace {

using namespace vt;
using namespace vt::cuda;
using namespace vt::cuda::testing;

constexpr Stream kDefault{nullptr, 0};
/// More than it takes until a kernel is known to come again and again.
constexpr int kMany = 80;

const bool with_graphs = [] {
  const char* text = std::getenv("VT_CUDA_LAUNCH_GRAPHS");
  return !text || std::string_view(text) != "0";
}();

/// What kernels wrote, in the order in which they ran.
using Log = std::vector<int>;

template <class T>
T read(const std::vector<std::byte>& bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}
stub::Kernel logging_kernel() {
  return {{sizeof(Log*), sizeof(int)}, [](const auto& arguments) {
            read<Log*>(arguments[0])->push_back(read<int>(arguments[1]));
          }};
}
void launch(const stub::Kernel& kernel, Log& log, int value, Stream stream = kDefault,
            unsigned blocks = 1) {
  Log* to = &log;
  void* arguments[] = {&to, &value, nullptr};
  launch_kernel(&kernel, dim3(blocks), dim3(32), 0, arguments, stream);
  value = -1;  // the launch has a copy
}
Log numbers(int n) {
  Log all;
  for (int i = 0; i < n; ++i) all.push_back(i);
  return all;
}

/// In a thread of its own, which gives back what it holds as it ends.
void in_thread(const std::function<void()>& body) {
  std::thread(body).join();
  CHECK(launch_graphs() == 0 && stub::graphs() == 0);
}

void every_launch_has_its_arguments() {
  static const stub::Kernel first = logging_kernel(), second = logging_kernel();
  in_thread([] {
    Log log;
    const int64_t kernels = stub::kernel_launches(), graphs = stub::graph_launches();
    for (int i = 0; i < 3 * kMany; ++i) {
      launch(i % 3 ? first : second, log, i);
      if (i % 7 == 0) stub::enqueue(nullptr, [&log, i] { log.push_back(-i); });
    }
    CHECK(log.empty());
    const bool some = stub::graph_launches() - graphs > kMany;
    CHECK(some == with_graphs && launch_graphs() == (with_graphs ? 2 : 0));
    CHECK(stub::kernel_launches() + stub::graph_launches() - kernels - graphs == 3 * kMany);
    stub::finish_all();
    Log expected;
    for (int i = 0; i < 3 * kMany; ++i) {
      expected.push_back(i);
      if (i % 7 == 0) expected.push_back(-i);
    }
    CHECK(log == expected);
  });
}

void launches_outlive_the_thread_that_made_them() {
  static const stub::Kernel kernel = logging_kernel();
  Log log;
  in_thread([&] {
    for (int i = 0; i < kMany; ++i) launch(kernel, log, i);
  });
  CHECK(log.empty());
  stub::finish_all();
  CHECK(log == numbers(kMany));
}

void other_streams_and_captures() {
  static const stub::Kernel kernel = logging_kernel();
  in_thread([] {
    Stream side{nullptr, 0};
    cudaStreamCreateWithFlags(&side.handle, cudaStreamNonBlocking);
    Log log, other;
    const int64_t graphs = stub::graph_launches();
    for (int i = 0; i < kMany; ++i) launch(kernel, other, i, side);
    CHECK(stub::graph_launches() == graphs && launch_graphs() == 0);
    // A stream is captured while the kernel is launched on the default one, before and after it
    // has a graph, and on the captured one.
    cudaStreamBeginCapture(side.handle, cudaStreamCaptureModeGlobal);
    for (int i = 0; i < kMany; ++i) {
      launch(kernel, log, i);
      launch(kernel, other, kMany + i, side);
    }
    CHECK(launch_graphs() == with_graphs);
    cudaGraph_t graph = nullptr;
    CHECK(cudaStreamEndCapture(side.handle, &graph) == cudaSuccess);
    size_t nodes = 0;
    cudaGraphGetNodes(graph, nullptr, &nodes);
    CHECK(nodes == kMany);
    stub::finish_all();
    CHECK(log == numbers(kMany) && other == numbers(kMany));
    cudaGraphExec_t executable = nullptr;
    cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphLaunch(executable, side.handle);
    stub::finish_all();
    CHECK(other == numbers(2 * kMany));
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  });
}

void launches_in_clusters() {
  static const stub::Kernel kernel = logging_kernel();
  in_thread([] {
    Stream side{nullptr, 0};
    cudaStreamCreateWithFlags(&side.handle, cudaStreamNonBlocking);
    Log log;
    const auto in_clusters = [&](int value, dim3 grid, Stream stream) {
      Log* to = &log;
      void* arguments[] = {&to, &value, nullptr};
      launch_clusters(&kernel, grid, dim3(1, 4), dim3(32), 0, arguments, stream);
      value = -1;
    };
    // However often, each is a launch of its own, between those that are not.
    const int64_t kernels = stub::kernel_launches(), graphs = stub::graph_launches();
    for (int i = 0; i < kMany; ++i) in_clusters(i, dim3(3, 8), kDefault);
    CHECK(stub::kernel_launches() - kernels == kMany && stub::graph_launches() == graphs);
    launch(kernel, log, kMany);
    in_clusters(kMany + 1, dim3(1, 4), kDefault);
    stub::finish_all();
    CHECK(log == numbers(kMany + 2));
    CHECK(!error_of([&] { in_clusters(0, dim3(1, 6), kDefault); }).second.empty());
    cudaStreamBeginCapture(side.handle, cudaStreamCaptureModeGlobal);
    in_clusters(0, dim3(1, 4), side);
    cudaGraph_t graph = nullptr;
    CHECK(cudaStreamEndCapture(side.handle, &graph) == cudaSuccess);
    size_t nodes = 0;
    cudaGraphGetNodes(graph, nullptr, &nodes);
    CHECK(nodes == 1);
    cudaGraphDestroy(graph);
    stub::finish_all();
    CHECK(log == numbers(kMany + 2));
  });
}

void other_contexts() {
  static const stub::Kernel kernel = logging_kernel();
  in_thread([] {
    Log log;
    for (int i = 0; i < kMany; ++i) launch(kernel, log, i);
    const int64_t graphs = stub::graph_launches();
    stub::set_context(2);  // whose default stream is another
    launch(kernel, log, kMany);
    stub::set_context(0);
    launch(kernel, log, kMany + 1);
    CHECK(stub::graph_launches() == graphs);
    stub::set_context(1);
    launch(kernel, log, kMany + 2);
    CHECK(stub::graph_launches() == graphs + with_graphs);
    stub::finish_all();
    CHECK(log == numbers(kMany + 3));
  });
}

void refused_launches_are_told() {
  static const stub::Kernel kernel = logging_kernel();
  in_thread([] {
    Log log;
    for (int i = 0; i < 3 * kMany; ++i) {
      if (i == kMany)
        CHECK(!error_of([&] { launch(kernel, log, -1, kDefault, 0); }).second.empty());
      launch(kernel, log, i);
    }
    stub::finish_all();
    CHECK(log == numbers(3 * kMany));
  });
}

/// More kernels than graphs that there may be, and than places for them.
void many_kernels() {
  static const std::deque<stub::Kernel> kernels(5000, logging_kernel());
  for (const size_t count : {size_t{200}, size_t{600}, kernels.size()}) {
    in_thread([count] {
      Log log;
      for (int i = 0; i < static_cast<int>(count) * kMany; ++i)
        launch(kernels[static_cast<size_t>(i) % count], log, i);
      stub::finish_all();
      CHECK(log == numbers(static_cast<int>(count) * kMany));
      CHECK(launch_graphs() <= 256);
      if (count == 200) CHECK(launch_graphs() == (with_graphs ? 200 : 0));
    });
  }
}

/// A thread that has as many graphs as it may have begins anew, with what comes often now.
void kernels_change() {
  static const std::deque<stub::Kernel> before(250, logging_kernel()), after(50, logging_kernel());
  in_thread([] {
    Log log;
    int launched = 0;
    for (const auto* kernels : {&before, &after}) {
      for (int i = 0; i < 2 * kMany; ++i) {
        for (const stub::Kernel& kernel : *kernels) launch(kernel, log, launched++);
      }
    }
    const int64_t graphs = stub::graph_launches();
    for (const stub::Kernel& kernel : after) launch(kernel, log, launched++);
    CHECK(stub::graph_launches() - graphs == (with_graphs ? 50 : 0));
    stub::finish_all();
    CHECK(log == numbers(launched));
  });
}

void threads() {
  static const std::deque<stub::Kernel> kernels(100, logging_kernel());
  std::vector<Log> logs(4);
  std::vector<std::thread> all;
  for (Log& log : logs) {
    all.emplace_back([&log] {
      for (int i = 0; i < 100 * kMany; ++i) launch(kernels[static_cast<size_t>(i) % 100], log, i);
      stub::finish_all();
    });
  }
  for (std::thread& thread : all) thread.join();
  stub::finish_all();
  for (const Log& log : logs) CHECK(log == numbers(100 * kMany));
  CHECK(launch_graphs() == 0 && stub::graphs() == 0);
}

void any_call_may_fail() {
  static const stub::Kernel kernel = logging_kernel();
  for (int n = 1;; ++n) {
    bool failed = false;
    in_thread([&] {
      Log log, expected;
      stub::fail_call(n);
      for (int i = 0; i < kMany; ++i) {
        if (error_of([&] { launch(kernel, log, i); }).second.empty()) expected.push_back(i);
      }
      failed = stub::has_failed();
      stub::fail_call(0);
      stub::finish_all();
      CHECK(log == expected);
      // Only the look-up of the kernel, on its device, has no other way.
      CHECK(expected.size() == kMany || (n <= 2 && expected.size() == kMany - 1));
    });
    if (!failed) {
      CHECK(n > kMany);
      return;
    }
  }
}

}  // namespace

int main() {
  every_launch_has_its_arguments();
  launches_outlive_the_thread_that_made_them();
  other_streams_and_captures();
  launches_in_clusters();
  other_contexts();
  refused_launches_are_told();
  many_kernels();
  kernels_change();
  threads();
  any_call_may_fail();
  return finish("test_cuda_launch");
}
