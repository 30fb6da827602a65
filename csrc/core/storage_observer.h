// Sees the storages that a thread makes: a recording tells what its function makes from what was
// there before.
#pragma once

#include "core/storage.h"

namespace vt {

class StorageObserver {
 public:
  virtual ~StorageObserver() = default;
  /// A storage of fresh, uninitialised memory.
  virtual void allocated(const Storage& storage) = 0;
  /// The host has put values into it, or it borrows memory that has some.
  virtual void host_written(const Storage& storage) = 0;
};

/// Of this thread; null where nobody looks.
StorageObserver* storage_observer();
void set_storage_observer(StorageObserver* observer);
/// What fills a storage from the host, or makes one over the host's memory, says so here.
inline void note_host_written(const Storage& storage) {
  if (StorageObserver* observer = storage_observer()) [[unlikely]]
    observer->host_written(storage);
}

}  // namespace vt
