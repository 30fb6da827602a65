// Tensors that came to mean other memory: a count, so that whoever keeps addresses (captured steps)
// need not look at every tensor again while nothing happened.
#pragma once

#include <atomic>
#include <cstdint>

namespace vt {

/// Counts changes of an existing tensor's storage, geometry, dtype or leaf flag (`.data`, `set_`,
/// `resize_`, `t_`, `requires_grad_`), of the bytes behind a storage, and of a leaf's hooks. Read
/// it before looking, compare later.
extern std::atomic<uint64_t> rebindings;

/// Call after such a change.
inline void note_rebinding() { rebindings.fetch_add(1, std::memory_order_release); }

}  // namespace vt
