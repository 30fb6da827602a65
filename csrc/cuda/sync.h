// The places where the host waits for the device. Each passes here, so that waits can be counted,
// warned of, or refused (VT_SYNC_DEBUG, torch.cuda.set_sync_debug_mode).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

namespace vt::cuda {

enum class SyncDebug : int { Off = 0, Warn = 1, Error = 2 };

SyncDebug sync_debug();
void set_sync_debug(SyncDebug mode);
/// Called with the message of a wait in Warn mode.
void set_sync_warning(void (*warn)(const char* message));
/// Waits that ops have made in this process.
int64_t implicit_syncs();

/// Says that the host is about to wait for a result: counts; warns or throws as asked. Called
/// before the work is issued, so that where it throws nothing is under way.
void announce_wait(std::string_view what);
/// Waits for `stream`, after `announce_wait`.
void wait_for_announced(cudaStream_t stream, std::string_view what);
/// Both, for work that was issued without a thought of waiting.
void wait_for_result(cudaStream_t stream, std::string_view what);

/// VT_CUDA_LAUNCH_BLOCKING=1: every launch is waited for, so errors surface at their op.
extern const bool launch_blocking;
/// Waits for what was launched there if launches are waited for, unless it is captured.
void wait_if_blocking(cudaStream_t stream);

}  // namespace vt::cuda
