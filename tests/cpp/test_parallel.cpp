// The thread pool: coverage of ranges, determinism, exceptions, nesting, rival threads, fork.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu_count.h"
#include "core/error.h"
#include "core/parallel.h"

#include "check.h"

namespace {

using namespace vt;
using vt::test::failures;

using Parts = std::vector<std::pair<int64_t, int64_t>>;

Parts parts_of(int64_t begin, int64_t end, int64_t grain) {
  std::mutex mutex;
  Parts parts;
  parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    std::lock_guard lock(mutex);
    parts.emplace_back(first, last);
  });
  std::sort(parts.begin(), parts.end());
  return parts;
}

void ranges_are_covered_once() {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (int64_t n : {0, 1, 2, 63, 64, 65, 1000, 4096, 100001}) {
      for (int64_t grain : {0, 1, 7, 64, 1000, 1 << 20}) {
        for (int64_t begin : {int64_t{0}, int64_t{5}, int64_t{-9}}) {
          int64_t at = begin;
          bool ok = true;
          for (auto [first, last] : parts_of(begin, begin + n, grain)) {
            ok = ok && first == at && last > first;
            // Interior borders of long parts keep the vector loops' remainder at the very end.
            ok = ok && (last == begin + n || last - first < 256 || (last - begin) % 64 == 0);
            at = last;
          }
          CHECK(ok && at == begin + n);
        }
      }
    }
  }
}

void short_ranges_are_one_direct_call() {
  set_num_threads(4);
  CHECK(parts_of(0, 100, 100).size() == 1);
  CHECK(parts_of(0, 101, 100).size() > 1);
  const std::thread::id self = std::this_thread::get_id();
  parallel_for(0, 100, 100, [&](int64_t, int64_t) {
    CHECK(std::this_thread::get_id() == self);
    CHECK(!in_parallel_region());
  });
}

void chunks_run_once_and_sum_alike() {
  std::vector<float> values(100000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0f / static_cast<float>(i + 1);
  std::vector<float> sums;
  for (int threads : {1, 2, 5, 16}) {
    set_num_threads(threads);
    std::vector<float> partial(100);
    std::vector<std::atomic<int>> runs(100);
    parallel_chunks(100, [&](int64_t c) {
      runs[c].fetch_add(1);
      for (int64_t i = c * 1000; i < (c + 1) * 1000; ++i) partial[c] += values[i];
    });
    CHECK(std::all_of(runs.begin(), runs.end(), [](const auto& r) { return r.load() == 1; }));
    sums.push_back(std::accumulate(partial.begin(), partial.end(), 0.0f));
  }
  for (float sum : sums) CHECK(sum == sums[0]);
}

void workers_take_part() {
  set_num_threads(2);
  const std::thread::id self = std::this_thread::get_id();
  std::atomic<bool> other{false};
  // The first to come waits for the second, so both must be there.
  parallel_chunks(2, [&](int64_t) {
    if (std::this_thread::get_id() != self) other.store(true);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (!other.load() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  });
  CHECK(other.load());
}

/// The cores that a thread of this process may run on, as the system writes them.
std::string cores_allowed(const std::filesystem::path& task) {
  std::ifstream status(task / "status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("Cpus_allowed_list:")) return line;
  }
  return {};
}

void workers_may_run_on_every_core() {
  set_num_threads(available_cores());
  for (int round = 0; round < 20; ++round) {
    // Asleep: longer than workers spin.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    parallel_chunks(64, [](int64_t) {});
  }
  const std::string own = cores_allowed("/proc/thread-self");
  CHECK(!own.empty());
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task"))
    CHECK(cores_allowed(task.path()) == own);
}

void nested_regions_are_serial() {
  set_num_threads(4);
  std::atomic<int64_t> total{0};
  parallel_for(0, 64, 1, [&](int64_t first, int64_t last) {
    CHECK(in_parallel_region());
    for (int64_t i = first; i < last; ++i) {
      const std::thread::id self = std::this_thread::get_id();
      int calls = 0;
      parallel_for(0, 1000, 1, [&](int64_t a, int64_t b) {
        CHECK(std::this_thread::get_id() == self);
        ++calls;
        total += b - a;
      });
      CHECK(calls == 1);
    }
  });
  CHECK(total.load() == 64000);
  CHECK(!in_parallel_region());
}

void exceptions_reach_the_caller() {
  for (int threads : {1, 2, 4}) {
    set_num_threads(threads);
    for (int64_t thrower : {0, 50, 99}) {
      bool caught = false;
      try {
        parallel_chunks(100, [&](int64_t c) {
          if (c == thrower) throw std::out_of_range("chunk");
        });
      } catch (const std::out_of_range& e) {
        caught = std::strcmp(e.what(), "chunk") == 0;
      }
      CHECK(caught);
      CHECK(!in_parallel_region());
    }
    std::atomic<int> after{0};
    parallel_chunks(100, [&](int64_t) { ++after; });
    CHECK(after.load() == 100);
  }
}

void rival_threads_share_the_pool() {
  set_num_threads(3);
  std::vector<std::thread> users;
  std::atomic<int64_t> total{0};
  for (int u = 0; u < 4; ++u) {
    users.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        parallel_for(0, 1000, 10, [&](int64_t first, int64_t last) { total += last - first; });
      }
    });
  }
  for (std::thread& user : users) user.join();
  CHECK(total.load() == 4 * 200 * 1000);
}

void thread_count_may_change_between_regions() {
  for (int round = 0; round < 300; ++round) {
    set_num_threads(1 + round % 7);
    std::atomic<int> runs{0};
    parallel_chunks(1 + round % 13, [&](int64_t) { ++runs; });
    CHECK(runs.load() == 1 + round % 13);
  }
}

int status_of_child(int (*body)()) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang fails too
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int count_in_child() {
  std::atomic<int> runs{0};
  parallel_chunks(64, [&](int64_t) { ++runs; });
  return runs.load() == 64 ? 0 : 1;
}

[[maybe_unused]] void a_forked_child_has_its_own_pool() {
  set_num_threads(3);
  parallel_chunks(64, [](int64_t) {});
  CHECK(status_of_child(count_in_child) == 0);
  // Forked while another thread is inside a region.
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop.load()) parallel_chunks(64, [](int64_t) {});
  });
  for (int i = 0; i < 5; ++i) CHECK(status_of_child(count_in_child) == 0);
  stop.store(true);
  busy.join();
}

/// Runs this program again as `mode` with VT_NUM_THREADS set; its exit status.
int rerun(const char* program, const char* mode, const char* threads) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (threads) setenv("VT_NUM_THREADS", threads, 1);
    alarm(20);
    execl(program, program, mode, static_cast<char*>(nullptr));
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int child_mode(const char* mode) {
  if (std::strcmp(mode, "count") == 0) {
    try {
      return num_threads();
    } catch (const Error& e) {
      return e.kind() == ErrorKind::Value ? 90 : 91;
    }
  }
  if (std::strcmp(mode, "exit-busy") == 0) {  // a thread still in regions when main() is over
    std::thread([] {
      for (;;) parallel_chunks(64, [](int64_t) {});
    }).detach();
    parallel_chunks(64, [](int64_t) {});
    return 7;
  }
  if (std::strcmp(mode, "exit-inside") == 0) {
    parallel_chunks(64, [](int64_t i) {
      if (i == 0) std::exit(8);
    });
  }
  return 92;
}

void the_environment_sets_the_default(const char* program) {
  CHECK(rerun(program, "count", "3") == 3);
  CHECK(rerun(program, "count", "0") == 90);
  CHECK(rerun(program, "count", "two") == 90);
  CHECK(rerun(program, "count", "4x") == 90);
  CHECK(rerun(program, "count", "99999999999999999999") == 90);
  CHECK(rerun(program, "count", "") == available_cores());
  CHECK(available_cores() >= 1);
  for (int n : {0, -3, 1 << 20}) {
    bool refused = false;
    try {
      set_num_threads(n);
    } catch (const Error& e) {
      refused = e.kind() == ErrorKind::Value;
    }
    CHECK(refused);
  }
}

void exit_does_not_hang(const char* program) {
  for (int i = 0; i < 3; ++i) {
    CHECK(rerun(program, "exit-busy", "3") == 7);
    CHECK(rerun(program, "exit-inside", "3") == 8);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return child_mode(argv[1]);
  ranges_are_covered_once();
  short_ranges_are_one_direct_call();
  chunks_run_once_and_sum_alike();
  workers_take_part();
  workers_may_run_on_every_core();
  nested_regions_are_serial();
  exceptions_reach_the_caller();
  rival_threads_share_the_pool();
  thread_count_may_change_between_regions();
#if !defined(__SANITIZE_THREAD__)  // it forbids threads in a forked child
  a_forked_child_has_its_own_pool();
#endif
  the_environment_sets_the_default(argv[0]);
  exit_does_not_hang(argv[0]);
  if (failures == 0) std::puts("test_parallel: ok");
  return failures != 0;
}
