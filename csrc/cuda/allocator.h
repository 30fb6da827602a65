// The allocators in use: one caching allocator a device, made at the device's first allocation, and
// one of page-locked host memory. docs/allocator.md tells how they work.
#pragma once

#include <cuda_runtime_api.h>

#include "core/storage.h"
#include "cuda/allocator/caching_allocator.h"
#include "cuda/allocator/pinned_allocator.h"
#include "cuda/stream.h"

namespace vt::cuda {

/// What is called with a device that is about to be started, maybe by several threads at a time.
using StartHook = void (*)(int device);
void set_before_start(StartHook hook);

/// Registers the allocator of CUDA storages.
void install_allocator();
/// The allocator of a device. Never destroyed.
CachingAllocator& device_allocator(int device);
/// The allocator of a device, or null where nothing has been allocated yet.
CachingAllocator* device_allocator_if_used(int device);
PinnedAllocator& pinned_allocator();

/// The driver as allocators, events and rings see it; one a device, never destroyed.
DeviceApi& driver_of(int device);

/// Work on `stream`, of any device, uses the storage: its bytes are not handed out again before
/// that work is done. Nothing for memory that other code owns.
void record_stream(const Storage& storage, Stream stream);
/// Records history on every device, also on those not used yet. Where it goes on with the
/// recording (`options.clear` is false), the events stay.
void record_history(const HistoryOptions& options);
/// Tells `observer` of every out-of-memory error on every device, for good.
void add_out_of_memory_observer(CachingAllocator::OutOfMemoryObserver observer);
/// The page-locked memory's counters; zeros before its first use.
PinnedStats pinned_stats();
/// The allocator of page-locked memory, or null before its first use.
PinnedAllocator* pinned_allocator_if_used();

/// Gives a stream up before whoever made it destroys it: waits for its work, gives back what is
/// cached for it, and forgets it where memory waits for it.
void release_stream(Stream stream);
/// Gives memory that no tensor uses back to the driver, on all devices and the host.
void empty_cache();
bool is_pinned(const void* pointer);
/// The device of device or managed memory; -1 for other memory.
int device_of(const void* pointer);

}  // namespace vt::cuda
