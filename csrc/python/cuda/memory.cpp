// Memory as Python sees it: statistics, limits, callbacks, pools.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "core/error.h"
#include "cuda/allocator.h"
#include "cuda/device.h"
#include "python/cuda/bindings.h"
#include "python/cuda/frames.h"

namespace nb = nanobind;

namespace vt::cuda {
namespace {

uintptr_t number(StreamHandle stream) { return reinterpret_cast<uintptr_t>(stream); }
nb::tuple pool_tuple(MempoolId pool) { return nb::make_tuple(pool.first, pool.second); }
using PoolPair = std::pair<uint64_t, uint64_t>;
MempoolId pool_id(const PoolPair& pair) { return {pair.first, pair.second}; }

nb::dict dict_of(const std::vector<std::pair<std::string, int64_t>>& items) {
  nb::dict out;
  for (const auto& [name, value] : items) out[name.c_str()] = value;
  return out;
}

// --- callbacks

std::atomic<bool> closing{false};

/// A Python callable that any thread may call and drop.
class Callable {
 public:
  explicit Callable(nb::object function) : function_(std::move(function)) {}
  Callable(const Callable&) = delete;
  Callable& operator=(const Callable&) = delete;
  ~Callable() {
    if (closing) {
      function_.release();
      return;
    }
    const nb::gil_scoped_acquire gil;
    function_.reset();
  }
  /// Whether it returned something true; false when it raised, which is reported.
  template <class... Args>
  bool operator()(const char* what, Args... args) const {
    if (closing) return false;
    const nb::gil_scoped_acquire gil;
    try {
      return nb::cast<bool>(nb::bool_(function_(args...)));
    } catch (nb::python_error& error) {
      error.discard_as_unraisable(what);
      return false;
    }
  }

 private:
  nb::object function_;
};

void set_callback(int device, nb::object function) {
  CachingAllocator& allocator = device_allocator(checked_device(device));
  if (function.is_none()) {
    allocator.set_out_of_memory_callback(nullptr);
    return;
  }
  auto callable = std::make_shared<Callable>(std::move(function));
  allocator.set_out_of_memory_callback([callable, device](size_t nbytes) {
    return (*callable)("the out-of-memory callback", device, nbytes);
  });
}

void add_observer(nb::object function) {
  auto callable = std::make_shared<Callable>(std::move(function));
  add_out_of_memory_observer([callable](const CachingAllocator::OutOfMemoryEvent& event) {
    (*callable)("an out-of-memory observer", event.device_index, event.requested, event.total,
                event.free);
  });
}

// --- pools

/// A pool and its uses, one on each device it has served.
class HeldPool {
 public:
  explicit HeldPool(int device) : id_(new_mempool_id(true)), home_(checked_device(device)) {
    hold(home_);
  }
  HeldPool(const HeldPool&) = delete;
  HeldPool& operator=(const HeldPool&) = delete;
  ~HeldPool() {
    for (const int device : devices_) {
      try {
        device_allocator(device).release_pool(id_);
      } catch (const Error&) {
        // Somebody released our use; there is nothing left to give back.
      }
    }
  }
  void hold(int device) {
    if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
    devices_.reserve(devices_.size() + 1);
    device_allocator(checked_device(device)).hold_pool(id_);
    devices_.push_back(device);
  }
  int use_count() const { return device_allocator(home_).use_count(id_); }
  MempoolId id() const { return id_; }
  int device() const { return home_; }

 private:
  MempoolId id_;
  int home_;
  std::vector<int> devices_{};
};

void begin_allocate(int device, const PoolPair& pair) {
  CachingAllocator& allocator = device_allocator(checked_device(device));
  const MempoolId id = pool_id(pair);
  allocator.hold_pool(id);  // a handle that nobody has used yet
  try {
    allocator.begin_allocate_to_pool(id, AllocationRoute::this_thread());
  } catch (...) {
    allocator.release_pool(id);
    throw;
  }
  allocator.release_pool(id);
}

nb::list usage(int device) {
  nb::list out;
  CachingAllocator* allocator = device_allocator_if_used(checked_device(device));
  if (!allocator) return out;
  for (const PoolUsage& u : allocator->usage()) {
    nb::dict row;
    row["pool"] = pool_tuple(u.pool);
    row["stream"] = number(u.stream);
    row["use_count"] = u.use_count;
    row["allocated"] = u.allocated;
    row["pending"] = u.pending;
    row["cached"] = u.cached;
    row["reserved"] = u.reserved;
    row["largest_free"] = u.largest_free;
    row["blocks"] = u.blocks;
    out.append(row);
  }
  return out;
}

// --- memory without a tensor

/// What caching_allocator_alloc handed out.
class RawAllocations {
 public:
  uintptr_t allocate(size_t nbytes, int device, StreamHandle stream) {
    const Allocation made = device_allocator(checked_device(device)).allocate(nbytes, stream);
    if (!made.data) return 0;
    const auto address = reinterpret_cast<uintptr_t>(made.data);
    const std::lock_guard lock(mutex_);
    try {
      live_.emplace(address, made);
    } catch (...) {
      made.release(made.context, made.data, made.nbytes);
      throw;
    }
    return address;
  }
  void release(uintptr_t address) {
    if (address == 0) return;
    std::unique_lock lock(mutex_);
    const auto found = live_.find(address);
    check(found != live_.end(), "caching_allocator_delete: ", address,
          " was not returned by caching_allocator_alloc, or has been deleted");
    const Allocation gone = found->second;
    live_.erase(found);
    lock.unlock();
    gone.release(gone.context, gone.data, gone.nbytes);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uintptr_t, Allocation> live_;
};

RawAllocations& raw_allocations() {
  static auto* all = new RawAllocations;
  return *all;
}

void bind_statistics(nb::module_& m) {
  m.def("empty_cache", &empty_cache);
  m.def("memory_stats", [](int device) {
    CachingAllocator* allocator = device_allocator_if_used(checked_device(device));
    return allocator ? dict_of(flatten(allocator->stats())) : nb::dict();
  });
  m.def("reset_peak_stats", [](int device) {
    if (CachingAllocator* allocator = device_allocator_if_used(checked_device(device)))
      allocator->reset_peak_stats();
  });
  m.def("reset_accumulated_stats", [](int device) {
    if (CachingAllocator* allocator = device_allocator_if_used(checked_device(device)))
      allocator->reset_accumulated_stats();
  });
  m.def("memory_usage", &usage);
  m.def("check_memory",
        [](int device) { return device_allocator(checked_device(device)).check_invariants(); });
  m.def("host_memory_stats", [] { return dict_of(flatten(pinned_stats())); });
  m.def("reset_peak_host_stats", [] {
    if (PinnedAllocator* pinned = pinned_allocator_if_used()) pinned->reset_peak_stats();
  });
  m.def("reset_accumulated_host_stats", [] {
    if (PinnedAllocator* pinned = pinned_allocator_if_used()) pinned->reset_accumulated_stats();
  });
  m.def("allocator_backend", [] {
    return settings_from_environment().backend == Backend::Async ? "cudaMallocAsync" : "native";
  });
}

void bind_limits(nb::module_& m) {
  m.def("set_memory_fraction", [](double fraction, int device) {
    device_allocator(checked_device(device)).set_memory_fraction(fraction);
  });
  m.def("memory_fraction",
        [](int device) { return device_allocator(checked_device(device)).memory_fraction(); });
  m.def("set_memory_limit", [](size_t nbytes, int device) {
    device_allocator(checked_device(device)).set_memory_limit(nbytes);
  });
  m.def("set_out_of_memory_callback", &set_callback, nb::arg(), nb::arg().none());
  m.def("add_out_of_memory_observer", &add_observer);
  m.def("raw_alloc", [](size_t nbytes, int device, uintptr_t stream) {
    return raw_allocations().allocate(nbytes, device, reinterpret_cast<StreamHandle>(stream));
  });
  m.def("raw_delete", [](uintptr_t address) { raw_allocations().release(address); });
}

void bind_pools(nb::module_& m) {
  nb::class_<HeldPool>(m, "_MemPool")
      .def(nb::init<int>())
      .def("hold", &HeldPool::hold)
      .def("use_count", &HeldPool::use_count)
      .def_prop_ro("id", [](const HeldPool& pool) { return pool_tuple(pool.id()); })
      .def_prop_ro("device", &HeldPool::device);
  m.def("new_pool_handle", [] { return pool_tuple(new_mempool_id(false)); });
  m.def("begin_allocate_to_pool", &begin_allocate);
  m.def("end_allocate_to_pool", [](int device, const PoolPair& pool) {
    device_allocator(checked_device(device)).end_allocate_to_pool(pool_id(pool));
  });
}

}  // namespace

void bind_memory(nb::module_& m) {
  bind_statistics(m);
  bind_limits(m);
  bind_pools(m);
}

void close_memory() {
  stop_capturing();
  closing = true;
}

}  // namespace vt::cuda
