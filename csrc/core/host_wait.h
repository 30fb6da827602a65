// What the embedding language lets go of while the host waits for a device. The Python module
// releases the GIL here, so a backend library can wait without knowing Python.
#pragma once

namespace vt {

struct HostWaitHooks {
  /// Called before a wait. Null: nothing was let go of, and `end` is not called.
  void* (*begin)() = nullptr;
  /// Takes back what `begin` gave.
  void (*end)(void* held) = nullptr;
};

/// Set once, before any wait.
void set_host_wait_hooks(HostWaitHooks hooks);

/// A scope in which the thread waits. Take no lock outside it that a thread may want while it holds
/// what the hooks let go of.
class HostWait {
 public:
  HostWait();
  ~HostWait();
  HostWait(const HostWait&) = delete;
  HostWait& operator=(const HostWait&) = delete;

 private:
  void* held_;
};

}  // namespace vt
