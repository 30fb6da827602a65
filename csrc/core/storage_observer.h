// Sees the storages that a thread makes: a recording tells what its function makes from what was
// there before.
#pragma once

#include "core/storage.h"

namespace vt {

class StorageObserver {
 public:
  virtual ~StorageObserver() = default;
  /// A storage of fresh, uninitialised memory.
  virtual void allocated(Storage& storage) = 0;
  /// The host has put values into it. borrowed: it is a view of memory that has some, whose owner
  /// may change them.
  virtual void host_written(const Storage& storage, bool borrowed) = 0;
  /// Whether storages that are made on the device now may go without bytes, their address null,
  /// until the observer gives them some.
  virtual bool bytes_later(Device device) const { return (void)device, false; }
  /// The bytes are about to be used by another way than an op: by their address, or to be moved.
  virtual void bytes_wanted(Storage& storage) { (void)storage; }
};

/// Of this thread; null where nobody looks.
StorageObserver* storage_observer();
void set_storage_observer(StorageObserver* observer);
/// What fills a storage from the host, or makes one over somebody's memory (borrowed), says so
/// here.
inline void note_host_written(const Storage& storage, bool borrowed = false) {
  if (StorageObserver* observer = storage_observer()) [[unlikely]]
    observer->host_written(storage, borrowed);
}
/// What goes past the ops to the bytes of a storage says so here first.
inline void note_bytes_wanted(Storage& storage) {
  if (StorageObserver* observer = storage_observer()) [[unlikely]]
    observer->bytes_wanted(storage);
}

}  // namespace vt
