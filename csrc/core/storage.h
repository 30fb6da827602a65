// Storage: a block of bytes on one device, shared by every tensor that views it.
#pragma once

#include <atomic>

#include "core/allocator.h"
#include "core/ref.h"

namespace vt {

/// Counts in-place changes. Views of one base share it, so autograd can tell that a value saved
/// for backward was changed afterwards.
struct VersionCounter final : RefCounted {
  std::atomic<uint32_t> value{0};
};

class Storage final : public RefCounted {
 public:
  Storage(Allocation allocation, Device device);
  ~Storage() override;

  void* data() const { return allocation_.data; }
  size_t nbytes() const { return allocation_.nbytes; }
  /// Where the bytes came from: allocators know their own by `release`.
  const Allocation& allocation() const { return allocation_; }
  Device device() const { return device_; }
  /// The counter of tensors made directly on this storage; `.data` and friends get their own.
  std::atomic<uint32_t>& version() { return version_; }
  /// Swaps in other bytes (resize_); the old ones are given back.
  void replace(Allocation allocation);
  /// False for borrowed read-only memory (a read-only NumPy array or DLPack capsule).
  bool writable() const { return writable_; }
  void set_writable(bool writable) { writable_ = writable; }

  /// Live storages in the process, for leak tests.
  static int64_t live_count();

 private:
  Allocation allocation_;
  std::atomic<uint32_t> version_{0};
  Device device_;
  bool writable_ = true;
};

/// A fresh storage of `nbytes` on `device`.
Ref<Storage> allocate_storage(size_t nbytes, Device device);

}  // namespace vt
