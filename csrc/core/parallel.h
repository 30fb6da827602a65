// The thread pool of the CPU kernels. A region splits a range among the calling thread and the
// workers; the call returns when all of it is done. Regions do not nest: inside one, and when
// another thread has the pool, the work simply runs on the calling thread.
#pragma once

#include <cstdint>

#include "core/function_ref.h"

namespace vt {

/// Threads a region uses, the caller included. Until set: VT_NUM_THREADS (a ValueError if it is
/// not a positive integer), else the physical cores this process may use, by its affinity mask
/// and cgroup quota.
int num_threads();
/// Takes effect at the next region. ValueError unless 1 <= n <= 4096.
void set_num_threads(int n);
/// True while the calling thread runs a part of a region.
bool in_parallel_region();

/// Parts of [begin, end) in unspecified order and threads. Parts of 256 elements and more are
/// multiples of 64 long, so which elements land in a vector loop's remainder does not depend on
/// the number of threads.
void parallel_for_impl(int64_t begin, int64_t end, int64_t grain,
                       FunctionRef<void(int64_t, int64_t)> f);
void parallel_chunks_impl(int64_t n_chunks, FunctionRef<void(int64_t)> f);

/// Calls f(first, last) on disjoint parts that cover [begin, end), each of about `grain` elements
/// or more. Ranges up to `grain` are one direct call. The first exception of a part is rethrown
/// here, after the others have ended; parts not begun by then are skipped.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end <= begin) return;
  if (end - begin <= grain || in_parallel_region() || num_threads() == 1) {
    f(begin, end);
    return;
  }
  parallel_for_impl(begin, end, grain, f);
}

/// Calls f(i) once for each i in [0, n_chunks). For algorithms whose chunks are fixed by the
/// problem, so that results do not depend on the number of threads. Exceptions as above.
template <class F>
inline void parallel_chunks(int64_t n_chunks, const F& f) {
  if (n_chunks <= 1 || in_parallel_region() || num_threads() == 1) {
    for (int64_t i = 0; i < n_chunks; ++i) f(i);
    return;
  }
  parallel_chunks_impl(n_chunks, f);
}

}  // namespace vt
