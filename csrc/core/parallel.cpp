// How a region runs. The caller fills in the job, opens `state_` and pokes the workers it wants;
// each of them joins by adding itself to `state_` while it is still open. Tasks are claimed from
// one counter a slot, own slot first, then the others': a slot keeps its part of the data in its
// own cache, and a worker that wakes late costs nothing, since the rest do its tasks. When no task
// is left the caller closes `state_` and waits for those who joined; after that the job is its own
// again, and late workers find the door shut.
#include "core/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/cpu_count.h"
#include "core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vt {
namespace {

constexpr int kMaxThreads = 4096;
constexpr int kTasksPerThread = 4;  // evens out threads of unequal speed
constexpr int kWakeFanOut = 4;

thread_local bool in_region = false;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

/// Polls `done` for up to `limit`. The clock costs as much as some polls, so it is read rarely. The
/// core is offered to other threads now and then: one that spins must not keep out one that works.
template <class Done>
bool spin_until(std::chrono::microseconds limit, const Done& done) {
  using Clock = std::chrono::steady_clock;
  if (done()) return true;
  if (limit.count() == 0) return false;
  const Clock::time_point start = Clock::now();
  Clock::duration waited{};
  do {
    for (int i = 0; i < 32; ++i) {
      relax();
      if (done()) return true;
    }
    waited = Clock::now() - start;
    if (waited > std::chrono::microseconds(10)) std::this_thread::yield();
  } while (waited < limit);
  return false;
}

class Pool {
 public:
  explicit Pool(int cores) : cores_(cores) {}

  /// Ends the workers, after the region that runs, if any. Later regions are refused.
  void stop();

  /// f(i) for each i in [0, n). False, with nothing done, when another thread has the pool or no
  /// worker can be had.
  bool run(int64_t n, int threads, FunctionRef<void(int64_t)> f);

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  static constexpr int kAsleep = -1;
  struct alignas(64) Worker {
    Pool* pool = nullptr;
    int slot = 0;  // the caller's is 0
    std::atomic<uint32_t> pokes{0};
    std::atomic<int> core{kAsleep};  // where it spins
    pthread_t thread{};
  };
  struct Job {
    FunctionRef<void(int64_t)>* f = nullptr;
    int64_t n = 0;
    int slots = 0;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
  };

  // state_: open (bit 31) | slots wanted (bits 16 to 30) | workers inside (bits 0 to 15)
  static constexpr uint32_t kOpen = 1u << 31;
  static constexpr uint32_t kInside = (1u << 16) - 1;

  static void* worker_main(void* worker);
  static void poke(Worker& worker, int own_core);
  int start_workers(int wanted);
  void poke_from(int slot, int slots);
  bool join(int slot);
  void leave();
  void work(int slot);
  void run_task(int64_t i);

  const int cores_;
  std::mutex region_;  // held by the thread whose region runs
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<Worker*> worker_of_slot_[kMaxThreads] = {};
  std::unique_ptr<Counter[]> counters_;
  int counters_size_ = 0;
  Job job_;
  alignas(64) std::atomic<uint32_t> state_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> spin_us_{0};
};

void* Pool::worker_main(void* argument) {
  Worker& self = *static_cast<Worker*>(argument);
  Pool& pool = *self.pool;
  in_region = true;
  uint32_t seen = 0;
  for (;;) {
    const auto poked = [&] {
      const int core = sched_getcpu();
      if (self.core.load(std::memory_order_relaxed) != core)
        self.core.store(core, std::memory_order_relaxed);
      return self.pokes.load(std::memory_order_acquire) != seen;
    };
    const std::chrono::microseconds limit(pool.spin_us_.load(std::memory_order_relaxed));
    if (!spin_until(limit, poked)) {
      self.core.store(kAsleep, std::memory_order_relaxed);
      self.pokes.wait(seen, std::memory_order_acquire);
    }
    seen = self.pokes.load(std::memory_order_acquire);
    if (pool.stop_.load(std::memory_order_acquire)) return nullptr;
    if (!pool.join(self.slot)) continue;
    pool.poke_from(self.slot, pool.job_.slots);
    pool.work(self.slot);
    pool.leave();
  }
}

bool Pool::join(int slot) {
  uint32_t state = state_.load(std::memory_order_relaxed);
  do {
    const int wanted = static_cast<int>((state & ~kOpen) >> 16);
    if (!(state & kOpen) || slot >= wanted) return false;
  } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire,
                                         std::memory_order_relaxed));
  return true;
}

void Pool::leave() {
  const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
  if (!(before & kOpen) && (before & kInside) == 1) state_.notify_one();
}

/// Wakes a worker, on another core than the caller's (-1: no matter where). The system likes to
/// wake a thread where its waker runs, though that one works on and cores are idle, and the thread
/// then waits for a timer tick or several: for milliseconds.
void Pool::poke(Worker& worker, int own_core) {
  const int core = worker.core.load(std::memory_order_relaxed);
  cpu_set_t allowed;
  bool kept_off = false;
  if (own_core >= 0 && (core == kAsleep || core == own_core) &&
      pthread_getaffinity_np(worker.thread, sizeof(allowed), &allowed) == 0) {
    cpu_set_t others = allowed;
    CPU_CLR(own_core, &others);
    kept_off = pthread_setaffinity_np(worker.thread, sizeof(others), &others) == 0;
  }
  worker.pokes.fetch_add(1, std::memory_order_release);
  worker.pokes.notify_one();
  // It has its core now, and may go where the system puts it from there.
  if (kept_off) pthread_setaffinity_np(worker.thread, sizeof(allowed), &allowed);
}

/// Wakes the slots below `slot` in the tree of wake-ups: one thread alone would take longer to
/// wake a hundred sleepers than the work lasts.
void Pool::poke_from(int slot, int slots) {
  const int own_core = slots <= cores_ ? sched_getcpu() : -1;
  for (int child = slot * kWakeFanOut + 1; child <= (slot + 1) * kWakeFanOut && child < slots;
       ++child)
    poke(*worker_of_slot_[child].load(std::memory_order_acquire), own_core);
}

int Pool::start_workers(int wanted) {
  while (static_cast<int>(workers_.size()) < wanted) {
    auto worker = std::make_unique<Worker>();
    worker->pool = this;
    worker->slot = static_cast<int>(workers_.size()) + 1;
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int rc = pthread_create(&worker->thread, nullptr, &Pool::worker_main, worker.get());
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (rc != 0) break;  // no more threads to be had: make do with those there are
    worker_of_slot_[worker->slot].store(worker.get(), std::memory_order_release);
    workers_.push_back(std::move(worker));
  }
  return std::min(static_cast<int>(workers_.size()), wanted);
}

void Pool::run_task(int64_t i) {
  if (job_.failed.load(std::memory_order_relaxed)) return;
  try {
    (*job_.f)(i);
  } catch (...) {
    if (!job_.failed.exchange(true)) job_.error = std::current_exception();
  }
}

void Pool::work(int slot) {
  const int slots = job_.slots;
  for (int k = 0; k < slots; ++k) {
    const int64_t owner = (slot + k) % slots;
    const int64_t end = job_.n * (owner + 1) / slots;
    std::atomic<int64_t>& next = counters_[owner].next;
    while (next.load(std::memory_order_relaxed) < end) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= end) break;
      run_task(i);
    }
  }
}

bool Pool::run(int64_t n, int threads, FunctionRef<void(int64_t)> f) {
  std::unique_lock lock(region_, std::try_to_lock);
  if (!lock.owns_lock() || stop_.load(std::memory_order_relaxed)) return false;
  threads = static_cast<int>(std::min<int64_t>(threads, n));
  const int slots = start_workers(threads - 1) + 1;
  if (slots == 1) return false;
  if (counters_size_ < slots) {
    counters_ = std::make_unique<Counter[]>(slots);
    counters_size_ = slots;
  }
  for (int64_t s = 0; s < slots; ++s) {
    counters_[s].next.store(n * s / slots, std::memory_order_relaxed);
  }
  // Waking a sleeper takes 20 us and more, in a virtual machine much more, so workers stay awake
  // over the gaps between the ops of a training step; but not where there are too few cores.
  spin_us_.store(slots <= cores_ ? 200 : 0, std::memory_order_relaxed);
  job_.f = &f;
  job_.n = n;
  job_.slots = slots;
  job_.failed.store(false, std::memory_order_relaxed);
  job_.error = nullptr;
  state_.store(kOpen | static_cast<uint32_t>(slots) << 16, std::memory_order_release);

  in_region = true;
  poke_from(0, slots);
  work(0);
  in_region = false;

  uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  const auto alone = [&] {
    state = state_.load(std::memory_order_acquire);
    return (state & kInside) == 0;
  };
  const std::chrono::microseconds limit(slots <= cores_ ? 200 : 2);
  if (!spin_until(limit, alone)) {
    while (!alone()) state_.wait(state, std::memory_order_acquire);
  }
  if (job_.failed.load(std::memory_order_relaxed)) {
    std::rethrow_exception(std::exchange(job_.error, nullptr));
  }
  return true;
}

void Pool::stop() {
  std::lock_guard lock(region_);
  stop_.store(true, std::memory_order_release);
  for (auto& worker : workers_) {
    worker->pokes.fetch_add(1, std::memory_order_release);
    worker->pokes.notify_one();
  }
  for (auto& worker : workers_) pthread_join(worker->thread, nullptr);
}

int threads_from_environment() {
  const char* text = std::getenv("VT_NUM_THREADS");
  if (!text || !*text) return available_cores();
  char* end = nullptr;
  errno = 0;
  const long n = std::strtol(text, &end, 10);
  check_value(errno == 0 && *end == '\0' && n >= 1 && n <= kMaxThreads,
              "VT_NUM_THREADS must be an integer from 1 to ", kMaxThreads, ", got '", text, "'");
  return static_cast<int>(n);
}

std::atomic<int> thread_count{0};  // 0: not decided yet
std::atomic<Pool*> pool{nullptr};
std::mutex pool_creation;

/// Joins the workers before static objects go. The pool itself stays: a thread that outlives
/// main() may be about to enter a region, which is refused and so runs on that thread.
struct Shutdown {
  ~Shutdown() {
    if (in_region) return;  // exit() from inside a region: nobody could be joined
    if (Pool* last = pool.load()) last->stop();
  }
};

/// After fork() only the forking thread exists in the child. What the pool held is abandoned, not
/// freed: its locks and threads are in the middle of whatever they did.
void forget_pool() {
  pool.store(nullptr);
  in_region = false;
  pool_creation.unlock();
}

Pool& get_pool() {
  if (Pool* existing = pool.load(std::memory_order_acquire)) return *existing;
  std::lock_guard lock(pool_creation);
  if (Pool* existing = pool.load(std::memory_order_acquire)) return *existing;
  static Shutdown shutdown;
  static const int handlers =
      pthread_atfork([] { pool_creation.lock(); }, [] { pool_creation.unlock(); }, forget_pool);
  static_cast<void>(handlers);
  Pool* made = new Pool(available_cores());
  pool.store(made, std::memory_order_release);
  return *made;
}

}  // namespace

int num_threads() {
  int n = thread_count.load(std::memory_order_relaxed);
  if (n == 0) [[unlikely]] {
    const int initial = threads_from_environment();
    thread_count.compare_exchange_strong(n, initial);
    n = thread_count.load();
  }
  return n;
}

void set_num_threads(int n) {
  check_value(n >= 1 && n <= kMaxThreads, "set_num_threads expects an integer from 1 to ",
              kMaxThreads, ", got ", n);
  thread_count.store(n, std::memory_order_relaxed);
}

bool in_parallel_region() { return in_region; }

void parallel_for_impl(int64_t begin, int64_t end, int64_t grain,
                       FunctionRef<void(int64_t, int64_t)> f) {
  if (end <= begin) return;
  const int64_t n = end - begin;
  grain = std::max<int64_t>(grain, 1);
  const int64_t threads = std::min<int64_t>(num_threads(), (n + grain - 1) / grain);
  if (threads > 1 && !in_region) {
    const int64_t per_thread = std::clamp<int64_t>(n / (threads * grain), 1, kTasksPerThread);
    int64_t size = (n + threads * per_thread - 1) / (threads * per_thread);
    if (size >= 256) size = (size + 63) / 64 * 64;
    const int64_t tasks = (n + size - 1) / size;
    const auto task = [&](int64_t i) {
      const int64_t first = begin + i * size;
      f(first, std::min(first + size, end));
    };
    if (get_pool().run(tasks, static_cast<int>(threads), task)) return;
  }
  f(begin, end);
}

void parallel_chunks_impl(int64_t n_chunks, FunctionRef<void(int64_t)> f) {
  if (n_chunks > 1 && !in_region) {
    const int threads = num_threads();
    if (threads > 1 && get_pool().run(n_chunks, threads, f)) return;
  }
  for (int64_t i = 0; i < n_chunks; ++i) f(i);
}

}  // namespace vt
