// The lock of one pool of one stream. It is taken for some ten nanoseconds at a time and almost
// never contended, so it spins first; whoever finds it held across a driver call sleeps.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace vt::cuda {

class PoolLock {
 public:
  void lock() noexcept {
    if (!held_.exchange(true, std::memory_order_acquire)) [[likely]]
      return;
    lock_contended();
  }
  bool try_lock() noexcept { return !held_.exchange(true, std::memory_order_acquire); }
  void unlock() noexcept { held_.store(false, std::memory_order_release); }

 private:
  [[gnu::noinline]] void lock_contended() noexcept {
    for (int turn = 0;; ++turn) {
      for (int spin = 0; spin < 64; ++spin) {
        if (!held_.load(std::memory_order_relaxed) && try_lock()) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      if (turn < 32) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    }
  }

  std::atomic<bool> held_{false};
};

}  // namespace vt::cuda
